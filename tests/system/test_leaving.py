"""A learner leaves because it was asked to, and another group goes on in its place: without Ray."""

import asyncio
from pathlib import Path

import pytest

from distrl.errors import RunError
from distrl.messages import BatchGrant, LearnerStart, Whereabouts
from distrl.sampling import SampleRequest
from tests.builders import run
from tests.system.in_process import InProcessRun, build, states, ticket_of, until


async def sit(system: InProcessRun, pid: int, workers: int = 1) -> LearnerStart:
    group = [Whereabouts(pid + i, "here", "", pid) for i in range(workers)]
    return await system.coordinator.learner_begins(group[0], group)


async def leave(system: InProcessRun, start: LearnerStart, step: int) -> None:
    """Asks the learner to leave, which then asks for this step."""
    await system.coordinator.release_learner(start.session)
    assert await system.coordinator.next_batch(step, start.session) is None


def versions(system: InProcessRun) -> list[tuple[int, int]]:
    return [tuple(row) for row in system.ledger.rows("SELECT version, step FROM versions ORDER BY version")]


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_the_next_group_goes_on_where_the_one_before_left_with_no_version_and_no_step_more(
    tmp_path: Path, max_staleness: int
) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=4, max_staleness=max_staleness)
        await system.coordinator.start()
        first = await sit(system, 1)
        await system.learn(1)
        await system.learn(2)
        await leave(system, first, step=3)
        await system.checkpoint(2, version=2)
        second = await sit(system, 2, workers=2)
        assert (second.checkpoint, second.publish) == ("step-2", False)
        grant = await system.coordinator.next_batch(3, second.session)
        assert isinstance(grant, BatchGrant)
        await system.finish_step(grant)
        await leave(system, second, step=4)
        await system.checkpoint(3, version=3)
        third = await sit(system, 4)
        assert (third.checkpoint, third.publish) == ("step-3", False)
        await system.learn(4)
        await system.coordinator.done.wait()
        assert versions(system) == [(step, step) for step in range(5)]
        assert states(system) == {"committed": 6, "trained": 2}
        assert system.ledger.max_staleness() <= max_staleness
        snapshot = await system.coordinator.snapshot(0)
        kinds = {r["kind"] for r in snapshot["records"]}
        assert "learner" in kinds
        assert "rolled_back" not in kinds

    run(scenario())


def test_a_learner_that_waits_for_a_batch_leaves_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def hold(request: SampleRequest) -> None:
            if ticket_of(request) >= 0:
                await gate.wait()

        system = build(tmp_path, steps=1, gate=hold)
        await system.coordinator.start()
        first = await sit(system, 1)
        waiting = asyncio.create_task(system.coordinator.next_batch(1, first.session))
        await asyncio.sleep(0)
        await system.coordinator.release_learner(first.session)
        assert await waiting is None
        second = await sit(system, 2)
        assert (second.checkpoint, second.publish) == (None, False)  # the model's own weights, as at the beginning
        gate.set()
        grant = await system.coordinator.next_batch(1, second.session)
        assert isinstance(grant, BatchGrant)
        await system.finish_step(grant)
        await system.coordinator.done.wait()

    run(scenario())


@pytest.mark.parametrize("how", ["left without a checkpoint", "died with a batch", "died unasked"])
def test_a_group_after_one_that_lost_something_is_rolled_back(tmp_path: Path, how: str) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=3)
        await system.coordinator.start()
        first = await sit(system, 1)
        await system.learn(1)
        await system.checkpoint(1, version=1)
        if how == "left without a checkpoint":
            await system.learn(2)
            await leave(system, first, step=3)
        elif how == "died with a batch":
            await system.coordinator.next_batch(2, first.session)
            await system.coordinator.release_learner(first.session)
        second = await sit(system, 2)
        assert (second.checkpoint, second.publish) == ("step-1", True)
        await system.restore(1)
        await system.learn(2)
        await system.learn(3)
        await system.coordinator.done.wait()
        trained = system.ledger.rows("SELECT trained_step, COUNT(*) FROM tickets GROUP BY trained_step")
        assert [tuple(row) for row in trained] == [(1, 2), (2, 2), (3, 2)]

    run(scenario())


def test_what_a_learner_that_is_gone_was_asked_its_successor_is_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=1)
        await system.coordinator.start()
        first = await sit(system, 1)
        second = await sit(system, 2)
        await system.coordinator.release_learner(first.session)
        await system.restore(0)
        assert isinstance(await system.coordinator.next_batch(1, second.session), BatchGrant)

    run(scenario())


def test_one_that_stops_while_it_is_asked_to_leave_ends_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=3)
        await system.coordinator.start()
        first = await sit(system, 1)
        await system.learn(1)
        await system.coordinator.request_stop()
        await leave(system, first, step=2)
        await system.checkpoint(1, version=1)
        second = await sit(system, 2)
        assert second.publish is False
        assert await system.coordinator.next_batch(2, second.session) is None

    run(scenario())


def test_a_learner_that_was_replaced_cannot_end_the_run(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=1)
        await system.coordinator.start()
        first = await sit(system, 1)
        second = await sit(system, 2)
        await system.coordinator.learner_failed("it was replaced and must end", first.session)
        await until(lambda: True)
        snapshot = await system.coordinator.snapshot(0)
        assert snapshot["failed"] is None
        await system.coordinator.learner_failed("no memory", second.session)
        with pytest.raises(RunError):
            await system.coordinator.next_batch(1, second.session)
        snapshot = await system.coordinator.snapshot(0)
        assert snapshot["failed"] == "RunError: the learner failed: no memory"

    run(scenario())
