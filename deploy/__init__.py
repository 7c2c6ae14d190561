"""Puts a run together: CLI, wiring of Ray actors, progress, quickstart."""
