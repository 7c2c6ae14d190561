"""What the coordinator is told when it begins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.updates import UpdateLimits
from distrl.staleness import Admission
from distrl.tasks.problem import Problem


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    """The part of the config that the coordinator reads; see there for units."""

    seed: int
    steps: int
    group_size: int
    admission: Admission
    on_stale: str
    updates: UpdateLimits
    ready_bytes: int
    drops_in_a_row: int
    evaluate_every_steps: int
    keep_checkpoints: int
    opponents: bool = False
    """Whether something is sampled from weights that are published for opponents."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Where tickets and evaluations get their problems from."""

    draw: Callable[[int], Problem]
    """Ticket number to problem, a pure function."""
    heldout: Sequence[Problem]
    """For the evaluations before and after training."""
    heldout_during: Sequence[Problem]
