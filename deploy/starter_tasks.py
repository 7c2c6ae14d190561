"""What `distrl init` can write a config for; apart from what writes it, which takes a quarter of a second to import."""

from typing import Literal

TaskName = Literal["sort_digits", "jsonl", "reasoning_gym"]
"""Where the prompts come from, see `data.source`."""
