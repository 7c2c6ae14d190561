"""A ticket under way: what is known of it, and references to its columns."""

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
    generation: Any = None
    grading: Any = None
    reference: Any = None
    opponents: Any = None
    """Reference to the generation batch of the ticket's opponents, where it has some."""
    bytes: int = 0
    versions: tuple[int, ...] = ()
    """All policy versions that sampled one of its tokens."""
    oldest_version: int = 0
    newest_version: int = 0
    reward_mean: float = 0.0
    response_tokens: int = 0
    losses: int = 0
    """Workers that died while they had it."""
    timeline: list[Span] = field(default_factory=list)
    """What was done to it when, for the report of who waits for whom."""

    def enter(self, stage: str, now: float) -> None:
        self.stage, self.stage_since_s = stage, now

    @property
    def ready(self) -> bool:
        return self.stage == "ready"
