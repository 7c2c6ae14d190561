"""What may go wrong in a simulated run, drawn from a seed, and how a failing schedule is made small."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    CRASH = "crash"
    """All processes end at this await."""
    CRASH_IN_SQL = "crash_in_sql"
    """All processes end at this statement of the ledger."""
    ZOMBIE = "zombie"
    """The run is taken over by another driver, while the old coordinator goes on."""
    DISK_FULL = "disk_full"
    """The ledger's disk is full at this statement."""
    LOSE_REQUEST = "lose_request"
    LOSE_ANSWER = "lose_answer"
    """The call was carried out, and nobody hears of it."""
    DUPLICATE = "duplicate"
    """The call is carried out twice."""
    FAIL = "fail"
    DELAY = "delay"
    """The call takes longer than its timeout."""
    STOP = "stop"
    """Somebody asks the run to stop."""


IN_SQL = frozenset({Kind.CRASH_IN_SQL, Kind.DISK_FULL})


@dataclass(frozen=True, slots=True)
class Fault:
    kind: Kind
    at: int
    """Number of the await, or of the ledger's statement, from the start of the run; each happens once."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """One simulated run: its shape, its faults, and the seed of all delays and orders."""

    seed: int
    steps: int
    tickets_per_step: int
    max_staleness: int
    on_stale: str
    actors: int
    checkpoint_every: int
    evaluate_every: int
    reference: bool
    slow_actor: int
    """Index of a generation actor that is 20 times slower; -1 is none."""
    poison_actor: int
    """Index of a generation actor that fails every third call; -1 is none."""
    poison_tickets: tuple[int, ...]
    """Prompts that no grader can grade."""
    drop_abandoned: bool
    """Whether rollouts of weights that were left are sampled again."""
    slow_tickets: tuple[int, ...]
    """Tickets whose every draw takes forty times as long."""
    faults: tuple[Fault, ...]
    replays: int = 0
    """Tickets of every batch that another run has recorded; all of them is offline training."""
    replay_epochs: int = 1

    @property
    def offline(self) -> bool:
        return self.replays == self.tickets_per_step


def schedule_of(seed: int) -> Schedule:
    """The schedule that a seed names."""
    rng = random.Random(seed)
    steps, per_step = rng.randint(1, 6), rng.randint(1, 3)
    actors = rng.randint(1, 3)
    count = rng.choice((1, 1, 2, 3, 4, 6))
    kinds = list(Kind)
    faults = []
    for _ in range(count):
        kind = rng.choice(kinds)
        most = 60 * steps * per_step if kind in IN_SQL else 30 * steps * per_step
        faults.append(Fault(kind, rng.randint(0, most)))
    max_staleness = rng.choice((0, 0, 0, 1, 1, 2, 3))
    on_stale = rng.choice(("wait", "redraw", "keep"))
    stragglers = 0.8 if on_stale == "redraw" else 0.2
    replaying = random.Random(f"replay {seed}")  # of its own: the other draws of a seed stay what they are
    return Schedule(
        seed=seed,
        steps=steps,
        tickets_per_step=per_step,
        max_staleness=max_staleness,
        # The config refuses it where nothing would be drawn again.
        on_stale="wait" if on_stale == "redraw" and max_staleness == 0 else on_stale,
        actors=actors,
        checkpoint_every=rng.randint(1, 3),
        evaluate_every=rng.choice((0, 0, 1, 2)),
        reference=rng.random() < 0.5,
        slow_actor=rng.randrange(actors) if rng.random() < 0.3 else -1,
        poison_actor=rng.randrange(actors) if rng.random() < 0.2 else -1,
        poison_tickets=tuple(rng.sample(range(8), rng.randint(1, 2))) if rng.random() < 0.2 else (),
        slow_tickets=tuple(rng.sample(range(10), rng.randint(1, 3))) if rng.random() < stragglers else (),
        drop_abandoned=rng.random() < 0.4,
        faults=tuple(faults),
        replays=replaying.randint(1, per_step) if replaying.random() < 0.3 else 0,
        replay_epochs=replaying.randint(1, 2),
    )


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """A schedule that still fails and in which nothing can be left out or made smaller alone."""
    again = True
    while again:
        again = False
        for smaller in _smaller(schedule):
            if fails(smaller):
                schedule, again = smaller, True
                break
    return schedule


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    for i in range(len(schedule.faults)):
        yield replace(schedule, faults=schedule.faults[:i] + schedule.faults[i + 1 :])
    plain: dict[str, Any] = {
        "poison_tickets": (),
        "slow_tickets": (),
        "poison_actor": -1,
        "slow_actor": -1,
        "reference": False,
        "drop_abandoned": False,
        "evaluate_every": 0,
        "on_stale": "wait",
        "checkpoint_every": 1,
        "replays": 0,
        "replay_epochs": 1,
    }
    for name, value in plain.items():
        if getattr(schedule, name) != value:
            yield replace(schedule, **{name: value})
    for name, least in (("steps", 1), ("tickets_per_step", 1), ("actors", 1), ("max_staleness", 0)):
        value = getattr(schedule, name)
        if value > least and not (name == "tickets_per_step" and value == schedule.replays):
            yield replace(schedule, **{name: value - 1})
    for i, fault in enumerate(schedule.faults):
        for at in {fault.at // 2, fault.at - 1} - {fault.at}:
            if at >= 0:
                yield replace(
                    schedule,
                    faults=(*schedule.faults[:i], replace(fault, at=at), *schedule.faults[i + 1 :]),
                )
