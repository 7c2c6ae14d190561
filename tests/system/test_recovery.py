"""Stages, coordinator and learner die, in one process: nothing is lost, nothing is trained twice."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.calls import LocalCaller, WorkerLostError
from distrl.errors import RunError
from distrl.messages import BatchGrant, Whereabouts
from distrl.sampling import SampleRequest
from tests.builders import run
from tests.system.in_process import InProcessRun, build, states, ticket_of, until


class Mortal:
    """A worker whose calls fail once it is dead, as those of a killed actor do."""

    def __init__(self, worker: object) -> None:
        self._worker = worker
        self.dead = asyncio.Event()

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any) -> Any:
            work = asyncio.ensure_future(getattr(self._worker, method)(*args))
            death = asyncio.ensure_future(self.dead.wait())
            await asyncio.wait([work, death], return_when=asyncio.FIRST_COMPLETED)
            if self.dead.is_set():
                work.cancel()
                raise WorkerLostError("the process is gone")
            death.cancel()
            return await work

        return call


def mortal(system: InProcessRun, stage: str, number: int = 0) -> Mortal:
    """Makes a member of a stage mortal."""
    pool = getattr(system.pipeline, stage)
    caller = pool.members[number].caller
    caller._worker = Mortal(caller._worker)
    worker: Mortal = caller._worker
    return worker


def records(system: InProcessRun, kind: str) -> list[str]:
    return [r["message"] for r in system.coordinator._recorder.after(-1) if r["kind"] == kind]


def test_tickets_of_a_dead_generation_actor_are_sampled_by_another_and_the_attempt_is_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def hold(request: SampleRequest) -> None:
            if ticket_of(request) >= 0:
                await gate.wait()

        system = build(tmp_path, steps=2, generation_actors=2, gate=hold, slots=4, attempts=3)
        victim = mortal(system, "generation")
        await system.coordinator.start()
        await until(lambda: system.pipeline.generation.busy == 8)
        victim.dead.set()
        await until(lambda: len(system.pipeline.generation.members) == 1)
        gate.set()
        trained = [t.ticket_id for step in (1, 2) for t in (await system.learn(step)).tickets]
        await system.coordinator.done.wait()
        assert sorted(trained) == [0, 1, 2, 3]
        attempts = system.ledger.rows("SELECT attempts FROM tickets ORDER BY ticket_id")
        assert sum(row["attempts"] for row in attempts) == 2  # the two that were there
        snapshot = await system.coordinator.snapshot(-1)
        assert snapshot["lost"] == {"generation-0": "the process is gone"}

    run(scenario())


def test_an_actor_that_joins_pulls_the_newest_weights_before_it_samples(tmp_path: Path) -> None:
    async def scenario() -> None:
        hold_pull = asyncio.Event()
        system = build(tmp_path, steps=4, max_staleness=3)
        await system.coordinator.start()
        await system.learn(1)
        await until(lambda: system.pipeline.generation.members[0].version == 1)
        other = build(tmp_path / "other", steps=4)  # a generation actor of the same kind, with the first weights
        worker = other.pipeline.generation.members[0].caller._worker

        async def wait(version: int) -> None:
            await hold_pull.wait()

        async def fetch(weights: str, version: int, have: Any) -> Any:
            await wait(version)
            delivery = await system.store.fetch(version, have, weights)
            return delivery.manifest, delivery.layout, delivery.chunks

        worker._fetch = fetch
        old = system.pipeline.generation.members[0]
        await system.coordinator.join("generation", LocalCaller("generation-1", worker), 8)
        await system.pipeline.lose(system.pipeline.generation, old, "killed")
        late = asyncio.create_task(system.learn(2))
        await asyncio.sleep(0.05)
        assert not other.engines[0].requests or late.done()
        hold_pull.set()
        await late
        for step in (3, 4):
            await system.learn(step)
        await system.coordinator.done.wait()
        assert other.engines[0].loads[0] >= 1

    run(scenario())


def test_an_actor_that_joins_while_the_run_starts_loads_every_version_once(tmp_path: Path) -> None:
    class SlowToAnswer(LocalCaller):
        asked, may_answer = asyncio.Event(), asyncio.Event()

        async def ask(self, method: str, *args: Any, timeout_s: float) -> Any:
            if method == "policy_version":
                self.asked.set()
                await self.may_answer.wait()
            return await super().ask(method, *args, timeout_s=timeout_s)

    async def scenario() -> None:
        system = build(tmp_path, steps=3, max_staleness=0)
        (member,) = system.pipeline.generation.members
        worker = member.caller._worker
        await system.pipeline.generation.remove(member)
        caller = SlowToAnswer("generation-1", worker)
        joining = asyncio.create_task(system.coordinator.join("generation", caller, 8))
        await caller.asked.wait()
        await system.coordinator.start()
        caller.may_answer.set()
        await joining
        for step in (1, 2, 3):
            await system.learn(step)
        await system.coordinator.done.wait()
        loads = [r for r in (await system.coordinator.snapshot(-1))["records"] if r["kind"] == "load"]
        assert [load["version"] for load in loads] == [1, 2, 3]

    run(scenario())


def test_a_ticket_that_kills_its_workers_is_dropped_with_the_cause_and_its_neighbours_are_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=2, generation_actors=6, slots=4, attempts=3)
        for number in range(6):
            worker = mortal(system, "generation", number)
            inner = worker._worker

            def poisoned(ticket: Any, worker: Mortal = worker, inner: Any = inner) -> Any:
                if ticket.ticket_id == 1 and ticket.role == "policy":
                    worker.dead.set()
                return inner.generate(ticket)

            worker.generate = poisoned_call(worker, poisoned)  # type: ignore[attr-defined]
        await system.coordinator.start()
        trained = [t.ticket_id for step in (1, 2) for t in (await system.learn(step)).tickets]
        await system.coordinator.done.wait()
        assert 1 not in trained
        dropped = system.ledger.rows("SELECT ticket_id, drop_reason, drop_detail FROM tickets WHERE state = 'dropped'")
        assert [tuple(row) for row in dropped] == [
            (1, "poison", "3 workers died that had it; the last was the process is gone")
        ]

    run(scenario())


def poisoned_call(worker: Mortal, generate: Any) -> Any:
    async def call(ticket: Any) -> Any:
        work = asyncio.ensure_future(generate(ticket))
        death = asyncio.ensure_future(worker.dead.wait())
        await asyncio.wait([work, death], return_when=asyncio.FIRST_COMPLETED)
        if worker.dead.is_set():
            work.cancel()
            raise WorkerLostError("the process is gone")
        death.cancel()
        return await work

    return call


async def coordinator_dies(system: InProcessRun, directory: Path, **changes: Any) -> InProcessRun:
    """Another coordinator on the same ledger and journal; the store and what it holds live."""
    again = build(directory, **changes)
    again.store = system.store
    for engine, old in zip(again.pipeline.generation.members, system.pipeline.generation.members, strict=True):
        engine.caller = old.caller
    await again.coordinator.start()
    for member in again.pipeline.generation.members:
        await again.coordinator._updates.enter(again.pipeline.generation, member, again.coordinator._may_load)
    return again


@pytest.mark.parametrize("told", ["nothing", "trained"])
def test_a_learner_that_lives_goes_on_with_a_coordinator_that_was_started_again(tmp_path: Path, told: str) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=4, max_staleness=1)
        await system.coordinator.start()
        trained = [t.ticket_id for t in (await system.learn(1)).tickets]
        grant = await system.coordinator.next_batch(2)
        assert isinstance(grant, BatchGrant)
        if told == "trained":
            await system.report(grant)  # and the answer is lost
        again = await coordinator_dies(system, tmp_path, steps=4, max_staleness=1)
        await again.finish_step(grant)
        trained += [t.ticket_id for t in grant.tickets]
        for step in (3, 4):
            trained += [t.ticket_id for t in (await again.learn(step)).tickets]
        await again.coordinator.done.wait()
        assert sorted(trained) == list(range(8))
        assert states(again) == {"trained": 8}
        assert [row["trained_step"] for row in again.ledger.rows("SELECT trained_step FROM tickets")].count(2) == 2

    run(scenario())


@pytest.mark.parametrize("coordinator", ["lives", "dies"])
def test_the_first_evaluation_is_made_once_although_the_learner_dies_during_it(
    tmp_path: Path, coordinator: str
) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def hold(request: SampleRequest) -> None:
            if ticket_of(request) < 0:
                await gate.wait()

        system = build(tmp_path, steps=1, gate=hold)
        await system.coordinator.start()
        await until(lambda: states(system).get("ready", 0) >= 2)
        if coordinator == "dies":
            system = await coordinator_dies(system, tmp_path, steps=1)
        await system.coordinator.learner_begins(Whereabouts(1, "here", "", 1))
        await system.restore(0)
        gate.set()
        await until(lambda: bool(system.ledger.evaluations()))
        await system.learn(1)
        await system.coordinator.done.wait()
        assert [(row["name"], row["step"]) for row in system.ledger.evaluations()] == [("before", 0), ("after", 1)]

    run(scenario())


def test_a_learner_that_asks_for_its_batch_again_gets_the_same_tickets(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=2)
        await system.coordinator.start()
        first = await system.coordinator.next_batch(1)
        second = await system.coordinator.next_batch(1)
        assert isinstance(first, BatchGrant)
        assert isinstance(second, BatchGrant)
        assert [t.ticket_id for t in first.tickets] == [t.ticket_id for t in second.tickets]
        for one, other in zip(first.tickets, second.tickets, strict=True):
            assert one.generation.value.column("rollout_id") == other.generation.value.column("rollout_id")
        await system.finish_step(second)

    run(scenario())


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("granted", [False, True])
def test_a_learner_that_died_goes_back_to_the_checkpoint_and_trains_every_ticket_once(
    tmp_path: Path, max_staleness: int, granted: bool
) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=6, max_staleness=max_staleness, generation_actors=2)
        await system.coordinator.start()
        await system.learn(1)
        await system.checkpoint(1, version=1)
        await system.learn(2)
        await system.learn(3)
        if granted:
            await system.coordinator.next_batch(4)
        begun = await system.coordinator.learner_begins(Whereabouts(1, "here", "", 0))
        assert begun.checkpoint == "step-1"
        await system.restore(1)
        for step in range(2, 7):
            await system.learn(step)
        await system.coordinator.done.wait()
        assert states(system) == {"committed": 2, "trained": 10}
        steps = system.ledger.rows("SELECT trained_step, COUNT(*) AS n FROM tickets GROUP BY trained_step")
        assert [tuple(row) for row in steps] == [(step, 2) for step in range(1, 7)]
        assert system.ledger.max_staleness() <= max_staleness
        # A version is never used twice: steps 2 and 3 were made again under new numbers.
        made = system.ledger.rows("SELECT step, COUNT(*) AS n FROM versions GROUP BY step")
        assert [tuple(row) for row in made] == [(0, 1), (1, 2), (2, 2), (3, 2), (4, 1), (5, 1), (6, 1)]

    run(scenario())


def test_calls_of_a_learner_that_was_replaced_change_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def hold(request: SampleRequest) -> None:
            if ticket_of(request) >= 0:
                await gate.wait()

        system = build(tmp_path, steps=2, gate=hold)
        await system.coordinator.start()
        first = await system.coordinator.learner_begins(Whereabouts(1, "here", "", 1))
        waiting = asyncio.create_task(system.coordinator.next_batch(1, first.session))
        await asyncio.sleep(0)
        second = await system.coordinator.learner_begins(Whereabouts(2, "here", "", 2))
        assert (first.publish, second.publish) == (False, True)
        gate.set()
        with pytest.raises(RunError, match="this learner process was replaced by another one and must end"):
            await waiting
        version = await system.coordinator.restored(0, second.session)
        await system.publish(version, 0)
        grant = await system.coordinator.next_batch(1, second.session)
        assert isinstance(grant, BatchGrant)

    run(scenario())
