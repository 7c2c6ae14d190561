"""An environment whose process dies once, and a task of two turns that any model gets through."""

import os
from pathlib import Path

from distrl.tasks.problem import Problem


class Fragile:
    """Says a digit after the first message, and is done after the second one.

    Args:
        marker: a file; where it is not there, the process makes it and dies.
    """

    def __init__(self, marker: str) -> None:
        self._marker = Path(marker)
        self._turns = 0

    def reset(self, problem: Problem) -> str:
        self._turns = 0
        return ""

    def step(self, message: str) -> tuple[str, float, bool]:
        if not self._marker.exists():
            self._marker.touch()
            os._exit(1)
        self._turns += 1
        return "7", 0.5 * float("1" in message), self._turns == 2
