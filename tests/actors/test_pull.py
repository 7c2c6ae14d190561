"""A generation actor pulls weights: only what changed, verified before it is loaded, refused with the tensor named."""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.engines.fake import FakeEngine
from actors.generation import Generation
from actors.policy_store import PolicyStore
from distrl.errors import DamagedWeightsError, DistrlError, PolicyError
from distrl.messages import Chunk, Content, Layout, LoadReceipt, Manifest
from distrl.sampling import Engine, LoadReport, SampleRequest
from distrl.weights import policy_tensors
from tests.builders import make_ticket, run
from tests.engines.tiny import EOS, tiny_engine, tiny_model
from tests.system.in_process import PARAMS, Digits, send


def weights(*numbers: float) -> dict[str, Tensor]:
    return {f"w{i}": torch.full((4,), float(number)) for i, number in enumerate(numbers)}


class Wire:
    """The way from the store to the actor, on which a test may do damage."""

    def __init__(self) -> None:
        self.store = PolicyStore(keep=2, put=lambda chunk: chunk)
        self.moved: list[set[str]] = []
        self.damage: Any = lambda manifest, layout, chunks: (manifest, layout, chunks)

    async def fetch(
        self, weights: str, version: int, have: Mapping[str, Content]
    ) -> tuple[Manifest, Layout, Sequence[Chunk]]:
        delivery = await self.store.fetch(version, have, weights)
        chunks: Any = [chunk.copy() for chunk in delivery.chunks]  # type: ignore[attr-defined]
        self.moved.append(set(delivery.layout))
        return self.damage(delivery.manifest, delivery.layout, chunks)  # type: ignore[no-any-return]

    def actor(self, engine: Engine) -> Generation:
        return Generation(
            "generation-3", {"policy": engine}, Digits(), PARAMS, self.fetch, clock=iter(range(1000)).__next__
        )

    async def publish(self, version: int, tensors: Mapping[str, Tensor]) -> Manifest:
        return await send(self.store, tensors, version=version, step=version)


def test_a_pull_moves_only_what_changed_since_the_last_one() -> None:
    async def scenario() -> None:
        wire = Wire()
        actor = wire.actor(FakeEngine(policy=weights(0, 0, 0)))
        await wire.publish(1, weights(1, 2, 3))
        assert await actor.pull(1) == LoadReceipt(1, 1, 0.0, 0, moved_bytes=48, moved_tensors=3)
        await wire.publish(2, weights(1, 20, 3))
        assert await actor.pull(2) == LoadReceipt(2, 1, 0.0, 0, moved_bytes=16, moved_tensors=1)
        await wire.publish(3, weights(1, 20, 3))
        assert await actor.pull(3) == LoadReceipt(3, 1, 0.0, 0, moved_bytes=0, moved_tensors=0)
        assert wire.moved == [{"w0", "w1", "w2"}, {"w1"}, set()]

    run(scenario())


def test_a_model_whose_changed_tensors_alone_were_loaded_samples_as_the_learners_model() -> None:
    async def scenario() -> None:
        wire = Wire()
        engine, twin = tiny_engine(), tiny_engine()
        actor = wire.actor(engine)
        learner = policy_tensors(tiny_model(seed=9))
        await wire.publish(1, learner)
        await actor.pull(1)
        changed = "model.layers.0.mlp.down_proj.weight"
        learner[changed].mul_(-3)
        await wire.publish(2, learner)
        await actor.pull(2)
        assert wire.moved[1] == {changed}
        await twin.load(2, learner)
        request = SampleRequest("r", (3, 4, 5), 4, PARAMS, (1, 2, 3))
        assert await engine.sample(request) == await twin.sample(request)
        for one in (engine, twin):
            await one.close()

    run(scenario())


def flip_a_byte(manifest: Manifest, layout: Layout, chunks: list[Chunk]) -> Any:
    span = layout["w1"][0]
    chunks[span.chunk][span.offset] ^= 1
    return manifest, layout, chunks


def lose_a_tensor(manifest: Manifest, layout: Layout, chunks: list[Chunk]) -> Any:
    return replace(manifest, tensors=tuple(e for e in manifest.tensors if e.name != "w1")), layout, chunks


def bend_a_shape(manifest: Manifest, layout: Layout, chunks: list[Chunk]) -> Any:
    entries = [replace(e, shape=(2, 2)) if e.name == "w1" else e for e in manifest.tensors]
    return replace(manifest, tensors=tuple(entries)), layout, chunks


GOOD = torch.full((4,), 20.0).numpy().tobytes()
BAD = bytes([GOOD[0] ^ 1]) + GOOD[1:]
REMEDY = "publish distrl.weights.policy_tensors of the same model"


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (
            flip_a_byte,
            DamagedWeightsError,
            f"policy version 2: tensor w1 must have sha256 {hashlib.sha256(GOOD).hexdigest()}, got "
            f"{hashlib.sha256(BAD).hexdigest()}; the bytes were damaged on the way, publish the version again",
        ),
        (
            lose_a_tensor,
            PolicyError,
            f"policy version 2: tensor 'w1' must be given with shape [4], but is missing; {REMEDY}",
        ),
        (bend_a_shape, PolicyError, f"policy version 2: tensor 'w1' must have shape [4], got [2, 2]; {REMEDY}"),
    ],
)
def test_damaged_weights_are_refused_with_the_tensor_and_the_actor_keeps_its_version(
    damage: Any, kind: type[DistrlError], message: str
) -> None:
    async def scenario() -> None:
        wire = Wire()
        engine = FakeEngine(vocabulary_size=11, policy=weights(0, 0))
        actor = wire.actor(engine)
        await wire.publish(1, weights(1, 2))
        await actor.pull(1)
        await wire.publish(2, weights(10, 20))
        wire.damage = damage
        with pytest.raises(kind) as caught:
            await actor.pull(2)
        assert str(caught.value) == f"generation-3 keeps policy version 1: {message}"
        receipt, _ = await actor.generate(replace(make_ticket(5), prompt="5"))
        assert (engine.version, receipt.newest_version) == (1, 1)
        # The way is clear again, and the same pull succeeds.
        wire.damage = lambda *whole: whole
        assert (await actor.pull(2)).version == engine.version == 2

    run(scenario())


def test_after_a_load_that_broke_off_everything_is_fetched_again() -> None:
    async def scenario() -> None:
        wire = Wire()
        engine = BreaksOff(policy=weights(0, 0))
        actor = wire.actor(engine)
        await wire.publish(1, weights(1, 2))
        await actor.pull(1)
        await wire.publish(2, weights(1, 20))
        engine.broken = True
        with pytest.raises(OSError, match="device"):
            await actor.pull(2)
        engine.broken = False
        await actor.pull(2)
        assert wire.moved == [{"w0", "w1"}, {"w1"}, {"w0", "w1"}]

    run(scenario())


class BreaksOff(FakeEngine):
    """An engine that fails in the middle of a load: what it holds then, nobody knows."""

    broken = False

    async def load(self, version: int, tensors: Mapping[str, Tensor], *, changed_only: bool = False) -> LoadReport:
        if self.broken:
            raise OSError("device lost")
        return await super().load(version, tensors, changed_only=changed_only)


def test_an_engine_that_cannot_load_parts_is_given_everything() -> None:
    async def scenario() -> None:
        wire = Wire()
        actor = wire.actor(WholeOnly(policy=weights(0, 0)))
        for version in (1, 2):
            await wire.publish(version, weights(1, version))
            await actor.pull(version)
        assert wire.moved == [{"w0", "w1"}, {"w0", "w1"}]

    run(scenario())


class WholeOnly(FakeEngine):
    @property
    def loads_changes(self) -> bool:
        return False


def test_sampling_goes_on_while_weights_are_fetched() -> None:
    async def scenario() -> None:
        wire, arrived, hold = Wire(), asyncio.Event(), asyncio.Event()
        engine = FakeEngine(vocabulary_size=11, eos_token_id=EOS)

        async def slow(
            weights: str, version: int, have: Mapping[str, Content]
        ) -> tuple[Manifest, Layout, Sequence[Chunk]]:
            arrived.set()
            await hold.wait()
            return await wire.fetch(weights, version, have)

        actor = Generation("generation-0", {"policy": engine}, Digits(), PARAMS, slow)
        await wire.publish(1, weights(1))
        pull = asyncio.create_task(actor.pull(1))
        await arrived.wait()
        receipt, _ = await actor.generate(replace(make_ticket(1), prompt="1"))
        assert (receipt.newest_version, pull.done()) == (0, False)
        hold.set()
        await pull
        receipt, _ = await actor.generate(replace(make_ticket(2), prompt="2"))
        assert receipt.oldest_version == 1

    run(scenario())
