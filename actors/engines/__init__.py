"""Engines: what samples tokens inside a generation actor."""
