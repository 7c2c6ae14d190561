"""Generation and learner take turns on one device: never both at once, and nothing is lost at a change."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.calls import LocalCaller
from actors.engines.fake import FakeEngine
from actors.generation import Generation
from actors.pool import Pool
from actors.turns import Turns
from distrl.errors import StageError
from distrl.messages import BatchGrant, Manifest, StepReport
from distrl.objectives import build as build_recipe
from distrl.sampling import SampleRequest
from learners.checkpoint import TrainState
from learners.logp_check import LogpCheckSettings
from learners.loop import train
from learners.optimizer import OptimizerSettings
from learners.trainer import LoopSettings, Trainer
from learners.world import World
from tests.learners.workers import Tokenizer, make_model
from tests.system.in_process import PARAMS, Digits, InProcessRun, build, send, states


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 20))


def test_every_actor_sleeps_while_the_learner_has_a_batch_and_none_while_it_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        published = 0

        async def until_every_actor_has_it(_: SampleRequest) -> None:
            # One actor alone may sample a whole batch, so that the other sleeps through a version.
            while any(engine.version < published for engine in system.engines):
                await asyncio.sleep(0.001)

        system = build(
            tmp_path,
            steps=3,
            tickets_per_step=4,
            max_staleness=0,
            generation_actors=2,
            gate=until_every_actor_has_it,
            turns=True,
        )
        await system.coordinator.start()
        for step in (1, 2, 3):
            grant = await system.coordinator.next_batch(step)
            assert isinstance(grant, BatchGrant)
            assert [engine.asleep for engine in system.engines] == [True, True]
            assert [t.staleness for t in grant.tickets] == [0] * 4
            await system.finish_step(grant)
            published = step
            # It has published and still holds the device: nobody has been woken.
            assert [engine.asleep for engine in system.engines] == [True, True]
        await system.checkpoint(3, version=3)
        await system.coordinator.done.wait()
        assert [engine.asleep for engine in system.engines] == [False, False]
        assert states(system) == {"committed": 12}
        assert [(e["name"], e["newest_version"]) for e in system.ledger.evaluations()] == [("before", 0), ("after", 3)]
        # Each of them took every version, once: after a sleep nothing of the old weights is there.
        assert [engine.loads for engine in system.engines] == [[1, 2, 3], [1, 2, 3]]

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


@dataclass
class Bridge:
    """A training loop in a thread of its own, which calls the coordinator in the loop of the test."""

    system: InProcessRun
    loop: asyncio.AbstractEventLoop

    def _ask(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def next_batch(self, step: int, check: Callable[[], None]) -> Any:
        grant = self._ask(self.system.coordinator.next_batch(step))
        if not isinstance(grant, BatchGrant):
            return grant
        return [(t.generation.value, t.grading.value, None) for t in grant.tickets], {  # type: ignore[attr-defined]
            t.ticket_id: t.staleness for t in grant.tickets
        }

    def trained(self, report: StepReport, staleness: Mapping[int, int]) -> int:
        return int(self._ask(self.system.coordinator.trained(report, dict(staleness))))

    def restored(self, state: TrainState) -> int:
        raise AssertionError("nothing is restored here")

    def publish(self, manifest: Manifest, tensors: Mapping[str, Tensor], *, again: bool = False) -> None:
        async def publish() -> None:
            await send(self.system.store, tensors, version=manifest.version, step=manifest.step)
            await self.system.coordinator.published(manifest.version, manifest.step, manifest.sha256)

        self._ask(publish())

    def commit_checkpoint(self, path: Path, state: TrainState, sha256: str) -> None:
        self._ask(self.system.coordinator.commit_checkpoint(str(path), state.step, state.version, sha256))


class OneDevice:
    """A pretended device: refuses whoever comes while somebody else is on it, and keeps who came."""

    def __init__(self) -> None:
        self.on_it = "generation"
        self.came: list[str] = []

    def take(self, who: str) -> None:
        assert self.on_it in ("nobody", who), f"{who} came while {self.on_it} was there"
        self.on_it = who
        self.came.append(who)

    def leave(self, who: str) -> None:
        assert self.on_it == who
        self.on_it = "nobody"


class OnDevice(Trainer):
    """A trainer that tells the pretended device of its coming and going."""

    device: OneDevice

    @contextmanager
    def on_device(self) -> Iterator[None]:
        self.device.take("learner")
        with super().on_device():
            yield
        self.device.leave("learner")


def test_a_learner_on_the_device_and_the_engines_on_it_are_never_there_at_the_same_time(tmp_path: Path) -> None:
    """The training loop, the coordinator and the objects they move are the real ones; engine and device are not."""

    async def scenario() -> None:
        system = build(tmp_path / "run", steps=3, tickets_per_step=4, max_staleness=0, turns=True)
        device = OneDevice()
        (engine,) = system.engines
        sleep, wake = engine.sleep, engine.wake

        async def leave() -> None:
            await sleep()
            device.leave("generation")

        async def come() -> None:
            device.take("generation")
            await wake()

        engine.sleep, engine.wake = leave, come  # type: ignore[method-assign]
        settings = LoopSettings(
            steps=3,
            temperature=1.0,
            micro_batch_tokens=64,
            checkpoint_every_steps=2,
            checkpoints=tmp_path / "checkpoints",
            optimizer=OptimizerSettings(1e-2, 0, 0.0, (0.9, 0.95), 1.0),
            logp_check=LogpCheckSettings(0, 1.0, 0, "keep", 1.0),
            takes_turns=True,
        )
        trainer = OnDevice(make_model(torch.float32), Tokenizer(), build_recipe("topr"), settings)
        trainer.device = device
        await system.coordinator.start()
        bridge = Bridge(system, asyncio.get_running_loop())
        await asyncio.to_thread(train, trainer, settings, bridge, World(), None, lambda metrics: None)
        await system.coordinator.done.wait()
        # Each step once, with sampling before each and the last evaluation after the last.
        assert device.came == ["learner", "generation"] * 3
        assert states(system) == {"committed": 12}
        assert engine.loads == [1, 2, 3]

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
