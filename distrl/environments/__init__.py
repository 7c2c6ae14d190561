"""Environments: what a model talks to over several turns."""
