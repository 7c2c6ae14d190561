"""Runs programs that nobody trusts: no network, no files but a scratch folder, bounded time, memory and output."""
