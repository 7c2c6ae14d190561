"""What the coordinator is told when it begins."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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
    """Of the tickets that are sampled: its batch is the part of a step's batch that is not replayed."""
    on_stale: str
    updates: UpdateLimits
    ready_bytes: int
    drops_in_a_row: int
    evaluate_every_steps: int
    keep_checkpoints: int
    redraws: int
    drop_abandoned: bool = False
    """Whether rollouts of weights that were left after a roll-back are sampled again."""
    turns: bool = False
    """Whether generation and learner take turns on one device; only with a staleness bound of 0."""
    opponents: bool = False
    """Whether something is sampled from weights that are published for opponents."""
    replays_per_step: int = 0
    """Tickets of every step's batch that another run has recorded."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Where tickets and evaluations get their problems from."""

    draw: Callable[[int], Problem]
    """Ticket number to problem, a pure function."""
    heldout: Sequence[Problem]
    """For the evaluations before and after training."""
    heldout_during: Sequence[Problem]
    values: Mapping[str, float] = field(default_factory=dict)
    """V* by prompt id; empty where the objective reads none."""
