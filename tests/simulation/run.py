"""Plays a schedule to its end, over all crashes, and judges it; as a program it plays many.

python -m tests.simulation.run 2000            # seeds 0 to 1999
python -m tests.simulation.run 1 --seed 1234   # one of them
python -m tests.simulation.run 300 --mutations # faults in the code that keeps the accounts are found
"""

import argparse
import asyncio
import contextlib
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distrl.audit import Contract, audit
from distrl.errors import DeadlineError, DistrlError, FencedError, LedgerError, StageError
from tests.simulation.loop import NeverEndsError, VirtualLoop
from tests.simulation.mutations import MUTATIONS, mutated
from tests.simulation.schedule import Schedule, schedule_of, shrink
from tests.simulation.world import REDRAWS, DiedError, Disk, Faults, World

LONGEST_S = 20_000.0
"""Virtual seconds that a run may take."""
RESTARTS = 12


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a schedule."""

    broken: tuple[str, ...]
    """Invariants that do not hold; none if all is well."""
    weight: int
    """The final weights, as a hash of all that was trained."""
    drops: int
    restarts: int
    ledger: str
    """Everything in the ledger, as SQL."""


class BrokenError(AssertionError):
    """An invariant does not hold."""


def play(schedule: Schedule) -> Outcome:
    """Plays a schedule; the same one gives the same outcome."""
    # Files in memory: a journal file is synced for every flush.
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None, prefix="distrl-sim-") as directory:
        return _play(schedule, Path(directory))


def _play(schedule: Schedule, directory: Path) -> Outcome:
    rng = random.Random(schedule.seed)
    loop = VirtualLoop(rng)
    disk = Disk(directory / "run")
    try:
        return loop.run_until_complete(_drive(schedule, disk, Faults(schedule.faults), rng))
    except (BrokenError, NeverEndsError, TimeoutError) as error:
        return Outcome((str(error) or f"the run takes longer than {LONGEST_S:g} s",), 0, 0, 0, _dump(disk))
    finally:
        loop.end()


async def _drive(schedule: Schedule, disk: Disk, faults: Faults, rng: random.Random) -> Outcome:
    """The driver, and whoever starts it again."""
    driver: Any = asyncio.current_task()
    left: list[World] = []  # coordinators that were taken over and do not know it
    async with asyncio.timeout(LONGEST_S):
        for restart in range(RESTARTS):
            disk.directory.mkdir(exist_ok=True)
            world = World(schedule, disk, faults, rng)
            keep = {driver, *(asyncio.all_tasks() - {driver})}
            finished = await _incarnation(world)
            _judge(schedule, disk, finished=finished)
            if finished:
                await world.kill({driver})
                return _outcome(schedule, disk, restart)
            if world.zombie.is_set():
                left.append(world)
            else:
                await world.kill(keep)
            if not _has_checkpoint(disk):
                # Nothing to go on from: the run is started anew, and zombies of the old one have no file.
                await world.kill({driver})
                shutil.rmtree(disk.directory)
                disk.checkpoints.clear()
    raise BrokenError(f"the run was started {RESTARTS} times and did not finish")


async def _incarnation(world: World) -> bool:
    """Runs until the end, a crash, a takeover or a failure; whether it has finished."""
    try:
        world.begin()
    except (DiedError, LedgerError) as error:
        _excuse(world, error)
        return False
    await world.coordinator.start()
    learner = world.spawn(world.learn())
    ends = [
        learner,
        world.spawn(world.crashed.wait()),
        world.spawn(world.zombie.wait()),
        world.spawn(_failure(world)),
    ]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if world.crashed.is_set():
        return False
    if world.zombie.is_set():
        learner.cancel()
        return False
    if learner.done() and not learner.cancelled() and (error := learner.exception()) is not None:
        _excuse(world, error)
        return False
    if not learner.done():
        try:
            world.coordinator._outcome.check()
        except DistrlError as error:
            _excuse(world, error)
        return False
    if world.coordinator._stopping and world.coordinator._step < world.schedule.steps:
        return False
    done = world.spawn(world.coordinator.done.wait())
    await asyncio.wait([done, *ends[1:]], return_when=asyncio.FIRST_COMPLETED)
    return bool(done.done() and not world.crashed.is_set() and not world.zombie.is_set())


async def _failure(world: World) -> None:
    while world.coordinator._outcome.fatal is None:
        await asyncio.sleep(0.5)


def _excuse(world: World, error: BaseException) -> None:
    """A run may end on what was done to it, and on nothing else."""
    if isinstance(error, DiedError) or world.crashed.is_set():
        return
    text = str(error)
    # No problem of an evaluation could be sampled, every attempt met the poison actor: that ends a run.
    unsampled = "TicketFailedError" in text and "is poison" in text
    harmless = "disk is full" in text or "DiedError" in text or unsampled
    if isinstance(error, (DeadlineError, StageError)) or harmless:
        return
    if isinstance(error, FencedError):
        raise BrokenError(f"the owner of the ledger was fenced: {error}") from error
    raise BrokenError(f"the run ended on a fault of its own: {type(error).__name__}: {error}") from error


def _has_checkpoint(disk: Disk) -> bool:
    with contextlib.closing(sqlite3.connect(disk.directory / "ledger.sqlite")) as db:
        return bool(db.execute("SELECT COUNT(*) FROM checkpoints").fetchone()[0])


def _judge(schedule: Schedule, disk: Disk, *, finished: bool) -> None:
    """The audit, after every crash and at the end."""
    contract = Contract(
        schedule.tickets_per_step,
        None if schedule.on_stale == "keep" else schedule.max_staleness,
        finished,
        REDRAWS if schedule.on_stale == "redraw" else 0,
        schedule.drop_abandoned,
        schedule.replays,
        schedule.replay_epochs,
    )
    found = audit(disk.directory / "ledger.sqlite", contract)
    if found.violations:
        raise BrokenError("; ".join(f"{v.rule}: {v.detail}" for v in found.violations[:3]))
    if finished and found.committed_steps != schedule.steps:
        raise BrokenError(f"the run finished with {found.committed_steps} of {schedule.steps} steps committed")


def _outcome(schedule: Schedule, disk: Disk, restarts: int) -> Outcome:
    with contextlib.closing(sqlite3.connect(disk.directory / "ledger.sqlite")) as db:
        (path,) = db.execute("SELECT path FROM checkpoints ORDER BY rowid DESC LIMIT 1").fetchone()
        drops = "SELECT COUNT(*) FROM tickets WHERE drop_reason <> 'run_ended'"
        (dropped,) = db.execute(drops).fetchone()
    step, weight = disk.checkpoints[path]
    if step != schedule.steps:
        raise BrokenError(f"the last checkpoint is of step {step}, the run has {schedule.steps}")
    return Outcome((), weight, dropped, restarts, _dump(disk))


def _dump(disk: Disk) -> str:
    path = disk.directory / "ledger.sqlite"
    if not path.exists():
        return ""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return "\n".join(db.iterdump()).replace(str(disk.directory), "RUN")


def undisturbed(schedule: Schedule) -> Schedule:
    """The same run, if nothing happens to it."""
    return replace(schedule, faults=(), slow_actor=-1, poison_actor=-1, poison_tickets=(), slow_tickets=(), actors=1)


def broken_by(seed: int) -> tuple[str, ...]:
    """Invariants that the schedule of a seed breaks."""
    return broken_in(schedule_of(seed))


def broken_in(schedule: Schedule) -> tuple[str, ...]:
    outcome = play(schedule)
    synchronous = schedule.max_staleness == 0 and schedule.on_stale != "keep"
    if outcome.broken or outcome.drops or not (synchronous or schedule.offline):
        return outcome.broken
    # Synchronous or offline training: whatever happened, it ends with the weights of a run to which nothing did.
    if outcome.weight != play(undisturbed(schedule)).weight:
        return ("the final weights are not those of the undisturbed run",)
    return ()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schedules", type=int, help="how many seeds, from --seed on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutations", action="store_true", help="search the seeds for one that finds each mutation")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.schedules)
    return _search(seeds) if arguments.mutations else _play_all(seeds)


def _search(seeds: range) -> int:
    missed = 0
    for mutation in MUTATIONS:
        with mutated(mutation):
            found = next(((s, broken) for s in seeds if (broken := broken_by(s))), None)
        missed += found is None
        print(f"{mutation.name}: " + ("not found" if found is None else f"seed {found[0]}, {found[1][0]}"))
    print(f"{len(MUTATIONS) - missed} of {len(MUTATIONS)} mutations found")
    return int(missed > 0)


def _play_all(seeds: range) -> int:
    began = time.perf_counter()
    faults: Counter[str] = Counter()
    for seed in seeds:
        schedule = schedule_of(seed)
        faults.update(f.kind for f in schedule.faults)
        if broken := broken_by(seed):
            small = shrink(schedule, lambda s: bool(broken_in(s)))
            print(f"seed {seed} breaks: {'; '.join(broken)}\nthe smallest schedule that fails: {small}")
            print("it breaks: " + "; ".join(broken_in(small)))
            return 1
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(faults.items()))
    print(f"{len(seeds)} schedules, no invariant broken, {time.perf_counter() - began:.0f} s; faults: {kinds}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
