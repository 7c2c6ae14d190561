"""The real coordinator, stages, ledger and journal over calls that are late, lost, doubled or cut by a crash."""

import asyncio
import hashlib
import math
import random
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from actors.calls import LocalRef
from actors.coordinator import Coordinator
from actors.engines.fake import FakeEngine
from actors.generation import Generation
from actors.grading import Grading
from actors.journal import Journal
from actors.pipeline import Pipeline, PipelineLimits
from actors.policy_store import PolicyStore
from actors.pool import Pool
from actors.recorder import Recorder
from actors.reference import Reference
from actors.replay import Replay
from actors.replays import Replays
from actors.settings import CoordinatorSettings, Prompts
from actors.updates import UpdateLimits
from distrl.errors import DeadlineError, StageError
from distrl.ledger import Ledger
from distrl.messages import BatchGrant, Content, Layout, Manifest, StepReport
from distrl.recording import read_recording
from distrl.rewards import Grade
from distrl.sampling import LoadReport, SampleRequest, SamplingParams
from distrl.schema import Role
from distrl.staleness import Admission
from distrl.storage import Folder
from distrl.tasks import Problem
from tests.recorded import small_recording
from tests.simulation.schedule import IN_SQL, Fault, Kind, Schedule
from tests.system.in_process import Digits, send, ticket_of

TIMEOUT_S = 30.0
REDRAWS = 1


class DiedError(BaseException):
    """What a statement of the ledger meets when its process is gone."""


class WeightEngine(FakeEngine):
    """Tokens depend on the weights, as they do in a real engine, and not on the number under which they came."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._weights = {0: 0}

    async def load(
        self, version: int, tensors: Mapping[str, torch.Tensor], *, changed_only: bool = False
    ) -> LoadReport:
        # Weights that are equal are not sent again.
        self._weights[version] = int(tensors["weight"][0]) if "weight" in tensors else self._weights[self.version]
        return await super().load(version, tensors, changed_only=changed_only)

    def _draw(self, request: SampleRequest, g: int, t: int, version: int) -> tuple[int, float]:
        return super()._draw(request, g, t, self._weights[version])


class HalfRight:
    """Grades every second response as right; some prompts nobody can grade."""

    def __init__(self, poison: Sequence[int]) -> None:
        self._poison = poison

    async def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        if int(problems[0].prompt) in self._poison:
            raise StageError(f"nobody can grade prompt {problems[0].prompt}")
        return [Grade(float(i % 2), {}, "correct" if i % 2 else "wrong") for i in range(len(responses))]

    def close(self) -> None:
        pass


@dataclass
class Disk:
    """What survives a crash beside the ledger and the journal: checkpoints, by path."""

    directory: Path
    checkpoints: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(step, weights)."""


class Faults:
    """Hands every fault out once, at its number, over all incarnations of a run."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._left = list(faults)
        self._awaits = 0
        self._statements = 0

    def at_await(self) -> Kind | None:
        self._awaits += 1
        return self._take(self._awaits - 1, sql=False)

    def at_statement(self) -> Kind | None:
        self._statements += 1
        return self._take(self._statements - 1, sql=True)

    def _take(self, number: int, *, sql: bool) -> Kind | None:
        for fault in self._left:
            if fault.at == number and (fault.kind in IN_SQL) == sql:
                self._left.remove(fault)
                return fault.kind
        return None


class Connection:
    """The ledger's connection, which may die or be refused by the disk at any statement."""

    def __init__(self, db: sqlite3.Connection, world: "World") -> None:
        self._db = db
        self._world = world
        self.dead = False

    def execute(self, *arguments: Any) -> Any:
        return self._guarded(self._db.execute, arguments)

    def executemany(self, *arguments: Any) -> Any:
        return self._guarded(self._db.executemany, arguments)

    def _guarded(self, call: Any, arguments: tuple[Any, ...]) -> Any:
        if self.dead:
            raise DiedError
        fault = self._world.faults.at_statement()
        if fault is Kind.CRASH_IN_SQL:
            self._world.crash()
            raise DiedError
        if fault is Kind.DISK_FULL and not str(arguments[0]).startswith(("ROLLBACK", "SELECT", "COMMIT")):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorname = "SQLITE_FULL"
            raise error
        return call(*arguments)

    @property
    def in_transaction(self) -> bool:
        return not self.dead and self._db.in_transaction

    def close(self) -> None:
        self.dead = True
        self._db.close()  # an open transaction is rolled back, as by the death of its process


class Wire:
    """A caller whose requests and answers may be late, lost or doubled."""

    def __init__(self, name: str, worker: object, world: "World", slowness: float = 1.0) -> None:
        self.name = name
        self._worker = worker
        self._world = world
        self._slowness = slowness

    async def batch(self, method: str, *args: Any, timeout_s: float) -> tuple[Any, Any]:
        receipt, batch = await self.ask(method, *args, timeout_s=timeout_s)
        return receipt, LocalRef(batch)

    async def ask(self, method: str, *args: Any, timeout_s: float) -> Any:
        where = f"{self.name}.{method}"
        try:
            async with asyncio.timeout(timeout_s):
                return await self._call(where, method, [a.value if isinstance(a, LocalRef) else a for a in args])
        except TimeoutError:
            raise DeadlineError(f"{where} must answer within {timeout_s:g} s, got nothing") from None

    async def _call(self, where: str, method: str, values: list[Any]) -> Any:
        world = self._world
        fault = await world.pause(self._slowness)
        if fault is Kind.LOSE_REQUEST or fault is Kind.FAIL:
            raise StageError(f"{where}: {fault}")
        if fault is Kind.DUPLICATE:
            world.spawn(getattr(self._worker, method)(*values))
        # Carried out to the end, whether or not somebody still waits for the answer.
        answer = await asyncio.shield(world.spawn(getattr(self._worker, method)(*values)))
        if await world.pause(self._slowness) is Kind.LOSE_ANSWER:
            raise StageError(f"{where}: {Kind.LOSE_ANSWER}")
        return answer


class World:
    """One incarnation of a run: all its processes, from start to end or crash."""

    def __init__(self, schedule: Schedule, disk: Disk, faults: Faults, rng: random.Random) -> None:
        self.schedule = schedule
        self.disk = disk
        self.faults = faults
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.crashed = asyncio.Event()
        self.zombie = asyncio.Event()
        self.ledger = Ledger(disk.directory / "ledger.sqlite", clock=self._loop.time, owner="a simulated driver")
        self.connection = Connection(self.ledger._db, self)
        self.ledger._db = self.connection  # type: ignore[assignment]
        self.store = PolicyStore(keep=2, put=lambda chunk: chunk)
        self.coordinator: Coordinator

    def begin(self) -> None:
        """Starts the coordinator's process, which may die of it."""
        self.coordinator = self._coordinator()

    # Time and faults --------------------------------------------------------------------------------------------

    async def pause(self, slowness: float = 1.0) -> Kind | None:
        """One await of a distributed system: it takes some time, and something may happen meanwhile."""
        fault = self.faults.at_await()
        if fault is Kind.CRASH:
            self.crash()
        elif fault is Kind.ZOMBIE:
            self.zombie.set()
        elif fault is Kind.STOP and not self.crashed.is_set():
            self.spawn(self.coordinator.request_stop())
        await asyncio.sleep(self._rng.expovariate(1.0) * 0.1 * slowness)
        if fault is Kind.DELAY:
            await asyncio.sleep(2 * TIMEOUT_S)
        if self.crashed.is_set():
            await asyncio.Event().wait()  # nothing happens any more in a process that is gone
        return fault

    def crash(self) -> None:
        self.connection.close()
        self.crashed.set()

    def spawn(self, coroutine: Any) -> "asyncio.Task[Any]":
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # told to whoever awaits it; a duplicate's has nobody

    # Processes --------------------------------------------------------------------------------------------------

    def _coordinator(self) -> Coordinator:
        schedule = self.schedule
        generation, grading, scoring = Pool("generation"), Pool("grading"), Pool("reference")
        for i in range(schedule.actors):
            engine = WeightEngine(vocabulary_size=11, fail=self._poison(i), gate=self._between_tokens)
            worker = Generation(
                f"generation-{i}", {"policy": engine}, Digits(), SamplingParams(4), self._fetch, clock=self._loop.time
            )
            slowness = 20.0 if i == schedule.slow_actor else 1.0
            generation.add(Wire(worker._name, worker, self, slowness), 4)
        grading.add(
            Wire("grading-0", Grading("half", HalfRight(schedule.poison_tickets), 1, clock=self._loop.time), self), 4
        )
        if schedule.reference:
            scoring.add(Wire("reference-0", Reference(_zero_logps, clock=self._loop.time), self), 1)
        journal = Wire("journal", Journal(self.disk.directory / "journal", clock=self._loop.time), self)
        limits = PipelineLimits(3, 0.1, TIMEOUT_S, TIMEOUT_S, TIMEOUT_S, TIMEOUT_S, TIMEOUT_S, 2, 2)
        pipeline = Pipeline(
            generation,
            grading,
            scoring if schedule.reference else None,
            journal,
            limits,
            self._loop.time,
            {Role.REPLAY: self._replay_pool()} if schedule.replays else None,
        )
        settings = CoordinatorSettings(
            seed=0,
            steps=schedule.steps,
            group_size=2,
            admission=Admission(schedule.max_staleness, schedule.tickets_per_step - schedule.replays),
            on_stale=schedule.on_stale,
            updates=UpdateLimits(8, 0.1, TIMEOUT_S, 20 * TIMEOUT_S),
            ready_bytes=1 << 30,
            drops_in_a_row=64,
            evaluate_every_steps=schedule.evaluate_every,
            keep_checkpoints=1000,
            redraws=REDRAWS,
            drop_abandoned=schedule.drop_abandoned,
            replays_per_step=schedule.replays,
        )
        heldout = [] if schedule.offline else [_problem(1000)]
        return Coordinator(
            settings,
            self.ledger,
            Prompts(_problem, heldout, heldout),
            pipeline,
            Recorder(None, self._loop.time),
            self._loop.time,
            replays=self._replays() if schedule.replays else None,
        )

    def _replays(self) -> Replays:
        return Replays(self.ledger, read_recording(self._recorded()), self.schedule.replay_epochs)

    def _replay_pool(self) -> Pool:
        pool = Pool("replay")
        worker = Replay(Folder(self._recorded().parent / "journal"), vocabulary=100, clock=self._loop.time)
        pool.add(Wire("replay-0", worker, self), 4)
        return pool

    def _recorded(self) -> Path:
        """The ledger of a recording that is just long enough, with some to spare for drops."""
        directory, schedule = self.disk.directory.parent / "recorded", self.schedule
        if not directory.exists():
            small_recording(directory, math.ceil(schedule.steps * schedule.replays / schedule.replay_epochs) + 3)
        return directory / "ledger.sqlite"

    def _poison(self, actor: int) -> Any:
        calls = 0

        def fail(request: SampleRequest) -> BaseException | None:
            nonlocal calls
            calls += 1
            poison = actor == self.schedule.poison_actor and calls % 3 == 0
            return StageError(f"generation-{actor} is poison") if poison else None

        return fail

    async def _between_tokens(self, request: SampleRequest) -> None:
        ticket_id = ticket_of(request)
        slowness = 40.0 if ticket_id in self.schedule.slow_tickets else 1.0
        await asyncio.sleep(self._rng.expovariate(1.0) * (0.05 if ticket_id >= 0 else 0.01) * slowness)

    async def _fetch(
        self, weights: str, version: int, have: Mapping[str, Content]
    ) -> tuple[Manifest, Layout, Sequence[Any]]:
        await self.pause()
        delivery = await self.store.fetch(version, have, weights)
        return delivery.manifest, delivery.layout, delivery.chunks

    async def learn(self) -> None:
        """What the learner's process does, from the last checkpoint to the end or to a stop: `learners.loop.train`."""
        last = self.ledger.last_checkpoint()
        step, weight, version = 0, 0, 0
        if last is not None:
            step, weight = self.disk.checkpoints[last.path]
            version = await self._tell(self.coordinator.restored, step)
            await self._publish(version, step, weight)
        saved = step
        publication: asyncio.Task[None] | None = None
        while step < self.schedule.steps:
            grant = await self._tell(self.coordinator.next_batch, step + 1)
            if not isinstance(grant, BatchGrant):
                break
            weight = _trained(weight, grant)
            step = grant.step
            report = StepReport(step, 0.0, 0.0, 0.0, {"loss": 0.0})
            ages = {t.ticket_id: t.staleness for t in grant.tickets}
            if publication is not None:
                await publication
            version = await self._tell(self.coordinator.trained, report, ages)
            publication = self.spawn(self._publish(version, step, weight))
            saves = step % self.schedule.checkpoint_every == 0
            if saves or not self.schedule.max_staleness:
                await publication
            if saves:
                saved = await self._save(step, version, weight)
        if publication is not None:
            await publication
        if saved < step:
            await self._save(step, version, weight)

    async def _publish(self, version: int, step: int, weight: int) -> None:
        await self.pause()
        manifest = await send(self.store, {"weight": torch.tensor([weight])}, version=version, step=step)
        await self._tell(self.coordinator.published, version, step, manifest.sha256)

    async def _save(self, step: int, version: int, weight: int) -> int:
        path = f"step-{step}-{version}"
        self.disk.checkpoints[path] = (step, weight)
        await self._tell(self.coordinator.commit_checkpoint, path, step, version, "0" * 64)
        return step

    async def _tell(self, call: Callable[..., Any], *arguments: Any) -> Any:
        await self.pause()
        answer = await call(*arguments)
        await self.pause()
        return answer

    # The end ----------------------------------------------------------------------------------------------------

    async def kill(self, keep: "set[asyncio.Task[Any]]") -> None:
        """Ends all tasks but `keep`; nothing of them reaches the ledger any more."""
        self.connection.close()
        for _ in range(100):
            tasks = asyncio.all_tasks() - keep
            if not tasks:
                return
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=0.001)
        raise AssertionError("tasks cannot be ended")


def _problem(ticket_id: int) -> Problem:
    return Problem.of(str(ticket_id), str(ticket_id))


def _zero_logps(batch: Any) -> list[Any]:
    return [[0.0] * len(row) for row in batch.column("response_token_ids").to_pylist()]


def _trained(weight: int, grant: BatchGrant) -> int:
    """Weights that depend on those before and on every token, reward and the order of the batch."""
    digest = hashlib.blake2b(str(weight).encode(), digest_size=6)
    for ticket in grant.tickets:
        for reference, columns in (
            (ticket.generation, ("rollout_id", "response_token_ids", "behavior_logps")),
            (ticket.grading, ("rollout_id", "reward")),
        ):
            rows = reference.value if isinstance(reference, LocalRef) else reference
            digest.update(repr(sorted(map(repr, rows.select(list(columns)).to_pylist()))).encode())
    return int.from_bytes(digest.digest())
