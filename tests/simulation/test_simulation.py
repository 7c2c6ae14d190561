"""No prompt is lost and none trained twice, whatever happens in which order: seeded schedules under a virtual clock.

The audit judges after every crash and at the end. `make simulate` plays thousands.
"""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.simulation.mutations import MUTATIONS, Mutation, mutated
from tests.simulation.run import broken_by, broken_in, play, undisturbed
from tests.simulation.schedule import Fault, Kind, schedule_of, shrink

SCHEDULES = 100
NEAR = 40
"""Seeds after the one that is known to find a mutation; changes of the code move it."""


@pytest.mark.parametrize("first", range(0, SCHEDULES, 50))
def test_no_schedule_breaks_an_invariant(first: int) -> None:
    for seed in range(first, first + 50):
        broken = broken_by(seed)
        assert not broken, f"python -m tests.simulation.run 1 --seed {seed}: {'; '.join(broken)}"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_fault_in_the_code_that_keeps_the_accounts_is_found(mutation: Mutation) -> None:
    with mutated(mutation):
        assert any(broken_by(seed) for seed in range(mutation.seed, mutation.seed + NEAR)), (
            "python -m tests.simulation.run 300 --mutations names a seed that finds it"
        )


def test_a_seed_gives_one_schedule_also_in_another_process() -> None:
    seeds = [7, 13, 29]
    here = [play(schedule_of(seed)).ledger for seed in seeds]
    code = (
        "import hashlib\nfrom tests.simulation.run import play, schedule_of\n"
        f"print(hashlib.sha256(repr([play(schedule_of(s)).ledger for s in {seeds}]).encode()).hexdigest())"
    )
    root = Path(__file__).parents[2]
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(root), "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    # Processes and hosts differ only in the names of the ledger's owners, which a simulated driver has not.
    assert there.stdout.strip() == hashlib.sha256(repr(here).encode()).hexdigest()


def test_the_schedules_are_not_harmless() -> None:
    """Crashes with something to go on from, drops, rollbacks and returned tickets occur in them."""
    outcomes = [play(schedule_of(seed)) for seed in range(40)]
    assert sum(o.restarts > 0 for o in outcomes) >= 10
    assert any(o.drops for o in outcomes)
    for cause in ("restart", "rollback", "redrawn"):
        assert any(f"'{cause}'" in o.ledger for o in outcomes), cause
    kinds = {f.kind for seed in range(40) for f in schedule_of(seed).faults}
    assert kinds == set(Kind)


def test_a_synchronous_run_that_crashes_ends_with_the_weights_of_one_that_did_not() -> None:
    calm = replace(
        undisturbed(schedule_of(0)), steps=5, tickets_per_step=2, max_staleness=0, on_stale="wait", checkpoint_every=2
    )
    expected = play(calm).weight
    for at in (60, 75, 90, 105, 120):
        outcome = play(replace(calm, faults=(Fault(Kind.CRASH, at),)))
        assert (outcome.broken, outcome.restarts, outcome.weight) == ((), 1, expected)


def test_a_failing_schedule_is_made_small() -> None:
    mutation = next(m for m in MUTATIONS if m.name == "steps since the checkpoint are forgotten after a crash")
    with mutated(mutation):
        seed = next(s for s in range(mutation.seed, mutation.seed + NEAR) if broken_by(s))
        small = shrink(schedule_of(seed), lambda s: bool(broken_in(s)))
        assert broken_in(small)
    (fault,) = small.faults
    assert fault.kind in (Kind.CRASH, Kind.CRASH_IN_SQL, Kind.ZOMBIE, Kind.DISK_FULL, Kind.DELAY)
    assert (small.poison_tickets, small.poison_actor, small.slow_actor, small.reference) == ((), -1, -1, False)
