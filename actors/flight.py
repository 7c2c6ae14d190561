"""A ticket under way: what is known of it, and references to its columns."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from actors.waits import Span
from distrl.tasks.problem import Problem
from distrl.tickets import Ticket


@dataclass(slots=True)
class Flight:
    """One ticket from issue to training; lives in the coordinator only."""

    ticket: Ticket
    problem: Problem
    oldest_step: int
    """Step of the oldest version that sampled, or may still sample, one of its tokens."""
    issued_s: float
    stage: str = "issue"
    """Where it is now; `ready` when it waits for the learner."""
    stage_since_s: float = 0.0
    calls: dict[str, tuple[str, float]] = field(default_factory=dict)
    """By stage what is waited for: the process that has the ticket, empty while none has a place, and since when."""
    generation: Any = None
    grading: Any = None
    reference: Any = None
    opponents: Any = None
    """Reference to the generation batch of the ticket's opponents, where it has some."""
    bytes: int = 0
    versions: tuple[int, ...] = ()
    """All policy versions that sampled one of its tokens; none where it is replayed."""
    reward_mean: float = 0.0
    response_tokens: int = 0
    losses: int = 0
    """Workers that died while they had it."""
    timeline: list[Span] = field(default_factory=list)
    """What was done to it when, for the report of who waits for whom."""
    task: "asyncio.Task[None] | None" = None
    """Takes it through its stages."""
    aborted: bool = False
    """What is sampled for it is of no use any more."""

    def enter(self, stage: str, now: float) -> None:
        self.stage, self.stage_since_s = stage, now
        self.calls.clear()

    def call(self, stage: str, process: str, now: float) -> None:
        """A stage has the ticket from now on; grading and reference scoring may have it at the same time.

        Args:
            process: empty while it waits for one.
        """
        self.calls[stage] = (process, now)

    def answered(self, stage: str) -> None:
        self.calls.pop(stage, None)

    def abort(self) -> None:
        """Ends the calls under way for it."""
        self.aborted = True
        # A task that has not begun would never run, and nobody give the places back that it was given.
        if self.task is not None and self.stage != "issue":
            self.task.cancel()

    @property
    def ready(self) -> bool:
        return self.stage == "ready"
