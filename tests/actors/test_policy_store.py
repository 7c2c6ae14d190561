"""The policy store: nothing is published by halves, only what changed moves, and old versions go."""

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.policy_store import PolicyStore
from distrl.errors import DistrlError, LostWeightsError, PolicyError
from distrl.manifest import cut, describe, lay_out, unpack
from distrl.messages import Chunk, Content, Manifest
from tests.builders import run
from tests.system.in_process import send


def weights(*numbers: float) -> dict[str, Tensor]:
    """Tensors of 16 bytes, each filled with one number: one chunk each."""
    return {f"w{i}": torch.full((4,), float(number)) for i, number in enumerate(numbers)}


def make_store(keep: int = 2) -> tuple[PolicyStore, list[Chunk]]:
    put: list[Chunk] = []

    def remember(chunk: Chunk) -> Chunk:
        put.append(chunk)
        return chunk

    return PolicyStore(keep, remember), put


async def publish(store: PolicyStore, version: int, tensors: dict[str, Tensor]) -> Manifest:
    return await send(store, tensors, version=version, step=version)


def contents(manifest: Manifest) -> dict[str, Content]:
    return {entry.name: entry.content for entry in manifest.tensors}


async def refused(kind: type[DistrlError], awaitable: Any) -> str:
    with pytest.raises(kind) as caught:
        await awaitable
    assert type(caught.value) is kind
    return str(caught.value)


async def fetched(store: PolicyStore, version: int, have: dict[str, Content]) -> dict[str, list[float]]:
    delivery = await store.fetch(version, have)
    chunks: Any = delivery.chunks
    return {n: t.tolist() for n, t in unpack(delivery.manifest, delivery.layout, chunks).items()}


def test_a_published_version_is_fetched_whatever_order_its_chunks_came_in() -> None:
    async def scenario() -> None:
        store, put = make_store()
        tensors = weights(1, 2, 3)
        manifest = describe(tensors, version=7, step=7)
        layout = lay_out(manifest.tensors, 16)
        chunks = list(cut(tensors, layout))
        for index in (2, 0, 1):
            await store.add_chunk("policy", 7, index, chunks[index])
        await store.publish(manifest, layout)

        assert (await store.fetch(7, {})).manifest == manifest
        assert await fetched(store, 7, {}) == {"w0": [1] * 4, "w1": [2] * 4, "w2": [3] * 4}
        assert len(put) == 3  # each was put once, by the store

    run(scenario())


def test_a_version_with_a_missing_chunk_is_not_published_until_it_is_sent() -> None:
    async def scenario() -> None:
        store, _ = make_store()
        tensors = weights(1, 2, 3)
        manifest = describe(tensors, version=7, step=7)
        layout = lay_out(manifest.tensors, 16)
        chunks = list(cut(tensors, layout))
        await store.add_chunk("policy", 7, 1, chunks[1])
        assert await refused(PolicyError, store.publish(manifest, layout)) == (
            "policy version 7 cannot be published: all 3 chunks must have arrived, missing [0, 2]; send them again"
        )
        assert await refused(LostWeightsError, store.fetch(7, {})) == (
            "policy version 7 must be in the store, which has none; pull the newest"
        )
        for index in (0, 2):
            await store.add_chunk("policy", 7, index, chunks[index])
        await store.publish(manifest, layout)
        assert (await store.fetch(7, {})).manifest == manifest

    run(scenario())


def test_a_chunk_that_is_sent_again_replaces_the_first() -> None:
    async def scenario() -> None:
        store, _ = make_store()
        await store.add_chunk("policy", 7, 1, torch.zeros(16, dtype=torch.uint8).numpy())
        await publish(store, 7, weights(1, 2))
        assert await fetched(store, 7, {}) == {"w0": [1] * 4, "w1": [2] * 4}

    run(scenario())


def test_only_changed_tensors_are_sent_and_fetched() -> None:
    async def scenario() -> None:
        store, put = make_store()
        old = await publish(store, 1, weights(1, 2, 3))
        new = weights(1, 20, 3)
        assert await store.wanted(describe(new, version=2, step=2)) == {"w1"}
        await publish(store, 2, new)
        assert [chunk.tobytes() for chunk in put[3:]] == [torch.full((4,), 20.0).numpy().tobytes()]
        delivery = await store.fetch(2, contents(old))
        assert (set(delivery.layout), len(delivery.chunks)) == ({"w1"}, 1)
        assert await fetched(store, 2, contents(old)) == {"w1": [20] * 4}
        # A late joiner gets everything, from the chunks of two publications.
        assert await fetched(store, 2, {}) == {"w0": [1] * 4, "w1": [20] * 4, "w2": [3] * 4}

    run(scenario())


def test_an_actor_that_missed_a_version_gets_what_changed_since_its_own() -> None:
    async def scenario() -> None:
        store, _ = make_store()
        first = await publish(store, 1, weights(1, 2, 3))
        await publish(store, 2, weights(1, 20, 3))
        await publish(store, 3, weights(1, 20, 30))
        assert await fetched(store, 3, contents(first)) == {"w1": [20] * 4, "w2": [30] * 4}

    run(scenario())


def test_values_that_moved_to_another_name_are_fetched_under_it() -> None:
    async def scenario() -> None:
        store, put = make_store()
        old = await publish(store, 1, weights(1, 2))
        await publish(store, 2, weights(2, 1))
        assert len(put) == 2  # the store has the bytes already
        assert await fetched(store, 2, contents(old)) == {"w0": [2] * 4, "w1": [1] * 4}

    run(scenario())


def test_equal_tensors_are_sent_once_and_both_arrive() -> None:
    async def scenario() -> None:
        store, put = make_store()
        await publish(store, 1, weights(5, 5, 6))
        assert len(put) == 2
        assert await fetched(store, 1, {}) == {"w0": [5] * 4, "w1": [5] * 4, "w2": [6] * 4}

    run(scenario())


def test_a_version_that_leans_on_weights_the_store_never_had_is_refused_with_the_tensor() -> None:
    """What a learner meets whose store was restarted between two calls."""

    async def scenario() -> None:
        store, _ = make_store()
        tensors = weights(1, 2)
        manifest = describe(tensors, version=3, step=3)
        layout = lay_out(manifest.tensors[:1], 16)
        await store.add_chunk("policy", 3, 0, next(cut(tensors, layout)))
        assert await refused(LostWeightsError, store.publish(manifest, layout)) == (
            "policy version 3 cannot be published: the store must have every tensor that is not sent, tensor w1 is "
            "neither here nor sent; send the whole policy"
        )
        assert await refused(LostWeightsError, store.fetch(3, {})) == (
            "policy version 3 must be in the store, which has none; pull the newest"
        )

    run(scenario())


def test_only_the_newest_versions_are_kept_and_their_bytes() -> None:
    async def scenario() -> None:
        store, _ = make_store(keep=2)
        for version in (3, 5, 8):
            await publish(store, version, weights(version, -version))
        assert await refused(LostWeightsError, store.fetch(3, {})) == (
            "policy version 3 must be in the store, which has [5, 8]; pull the newest"
        )
        assert [(await store.fetch(v, {})).manifest.version for v in (5, 8)] == [5, 8]
        assert await store.held() == {"versions": 2, "chunks": 4, "bytes": 64}

    run(scenario())


def test_what_is_kept_stays_below_twice_what_is_published_however_tensors_change() -> None:
    """A chunk of eight tensors loses one with every version: the last to stay would keep all of it."""

    async def scenario() -> None:
        store, _ = make_store(keep=1)
        numbers = list(range(8))
        for version in range(30):
            tensors = weights(*numbers)
            manifest = describe(tensors, version=version, step=version)
            wanted = await store.wanted(manifest)
            layout = lay_out([e for e in manifest.tensors if e.name in wanted], 128)
            for index, chunk in enumerate(cut(tensors, layout)):
                await store.add_chunk("policy", version, index, chunk)
            await store.publish(manifest, layout)
            assert (await store.held())["bytes"] < 2 * 128
            numbers[version % 7] = 100 + version  # the eighth never changes

    run(scenario())


def test_what_a_dead_learner_left_behind_goes_with_the_next_publication() -> None:
    async def scenario() -> None:
        store, _ = make_store()
        await publish(store, 1, weights(1))
        await store.add_chunk("policy", 2, 0, torch.zeros(1000, dtype=torch.uint8).numpy())
        assert (await store.held())["bytes"] == 1016
        await publish(store, 3, weights(3))
        assert (await store.held())["bytes"] == 32

    run(scenario())


def test_versions_do_not_mix_their_chunks() -> None:
    async def scenario() -> None:
        store, _ = make_store()
        await asyncio.gather(publish(store, 1, weights(1, 2)), publish(store, 2, weights(3, 4)))
        assert await fetched(store, 2, {}) == {"w0": [3] * 4, "w1": [4] * 4}

    run(scenario())


def test_references_are_handed_out_and_never_the_data() -> None:
    async def scenario() -> None:
        store = PolicyStore(1, lambda chunk: "reference")
        await publish(store, 0, weights(1, 2))
        assert (await store.fetch(0, {})).chunks == ("reference", "reference")

    run(scenario())
