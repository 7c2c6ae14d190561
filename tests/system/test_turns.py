"""Generation and learner take turns on one device: never both at once, and nothing is lost at a change."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from actors.calls import LocalCaller
from actors.engines.fake import FakeEngine
from actors.generation import Generation
from actors.pool import Pool
from actors.turns import Turns
from distrl.errors import StageError
from distrl.messages import BatchGrant
from distrl.sampling import SampleRequest
from tests.system.in_process import PARAMS, Digits, build, states


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 20))


def test_every_actor_sleeps_while_the_learner_has_a_batch_and_none_while_it_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=3, tickets_per_step=4, max_staleness=0, generation_actors=2, turns=True)
        await system.coordinator.start()
        for step in (1, 2, 3):
            grant = await system.coordinator.next_batch(step)
            assert isinstance(grant, BatchGrant)
            assert [engine.asleep for engine in system.engines] == [True, True]
            assert [t.staleness for t in grant.tickets] == [0] * 4
            await system.finish_step(grant)
            # It has published and still holds the device: nobody has been woken.
            assert [engine.asleep for engine in system.engines] == [True, True]
        await system.checkpoint(3, version=3)
        await system.coordinator.done.wait()
        assert [engine.asleep for engine in system.engines] == [False, False]
        assert states(system) == {"committed": 12}
        assert [(e["name"], e["newest_version"]) for e in system.ledger.evaluations()] == [("before", 0), ("after", 3)]
        # Each of them took every version: after a sleep nothing of the old weights is there.
        assert all(engine.loads == [1, 2, 3] for engine in system.engines)

    run(scenario())


def test_the_learner_gets_no_batch_before_the_first_evaluation_has_left_the_device(tmp_path: Path) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def hold_evaluations(request: SampleRequest) -> None:
            if request.request_id.startswith("e"):
                await gate.wait()

        system = build(tmp_path, steps=1, tickets_per_step=2, max_staleness=0, gate=hold_evaluations, turns=True)
        await system.coordinator.start()
        asked = asyncio.create_task(system.coordinator.next_batch(1))
        while states(system) != {"ready": 2}:
            await asyncio.sleep(0.001)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not asked.done()
        gate.set()
        assert isinstance(await asked, BatchGrant)
        assert system.engines[0].asleep

    run(scenario())


def turns_over(*engines: Any) -> Turns:
    pool = Pool("generation")
    for i, engine in enumerate(engines):
        worker = Generation(f"generation-{i}", {"policy": engine}, Digits(), PARAMS, _nothing)
        pool.add(LocalCaller(f"generation-{i}", worker), 8)
    return Turns([pool], timeout_s=5)


async def _nothing(*arguments: Any) -> Any:
    raise AssertionError("nothing is fetched here")


class CannotSleep:
    """An engine without the two methods."""


def test_an_engine_that_cannot_sleep_is_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(StageError) as caught:
            await turns_over(CannotSleep()).to_learner()
        assert str(caught.value) == (
            "generation-0 must have engines that can sleep, CannotSleep cannot; "
            "set placement.mode to another one than turns"
        )

    run(scenario())


def test_turns_are_taken_once_however_often_they_are_asked_for() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        turns = turns_over(engine)
        await turns.to_generation()  # it has it
        for _ in range(2):
            await turns.to_learner()
            assert (engine.asleep, turns.awake.is_set()) == (True, False)
        await asyncio.gather(turns.to_generation(), turns.to_generation())
        assert (engine.asleep, turns.awake.is_set()) == (False, True)

    run(scenario())
