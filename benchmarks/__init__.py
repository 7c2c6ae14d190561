"""Measurements: ratios of runs made side by side, printed as JSON lines."""
