"""The face that a run sees of its learner workers."""

from enum import StrEnum
from typing import Protocol


class GroupStatus(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"


class LearnerGroup(Protocol):
    """Starts and ends the worker processes that run `learners.loop.train`."""

    def start(self, workers: int) -> None:
        """Begins to start so many workers; returns at once. Again where those before have ended."""
        ...

    def status(self) -> GroupStatus: ...

    def error(self) -> BaseException | None:
        """Why the group failed, if it did."""
        ...

    def stop(self, timeout_s: float) -> None:
        """Waits at most `timeout_s` seconds for the workers to end; the coordinator tells them to."""
        ...
