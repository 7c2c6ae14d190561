"""The policy store: nothing is published by halves, and old versions go."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from actors.policy_store import PolicyStore
from distrl.errors import PolicyError
from distrl.manifest import Chunk, pack, unpack
from distrl.messages import Manifest
from tests.builders import run


def publication(version: int, tensors: int = 3) -> tuple[Manifest, list[Chunk]]:
    weights = {f"w{i}": torch.full((4,), float(version * 10 + i)) for i in range(tensors)}
    return pack(weights, version=version, step=version, chunk_bytes=16)  # one chunk each


def make_store(keep: int = 2) -> tuple[PolicyStore, list[Any]]:
    put: list[Any] = []

    def remember(chunk: Chunk) -> tuple[str, Chunk]:
        put.append(chunk)
        return ("ref", chunk)

    return PolicyStore(keep, remember), put


async def send(store: PolicyStore, manifest: Manifest, chunks: list[Chunk], order: list[int]) -> None:
    for index in order:
        await store.add_chunk(manifest.version, index, chunks[index])


async def refused(awaitable: Any) -> str:
    with pytest.raises(PolicyError) as caught:
        await awaitable
    return str(caught.value)


def test_a_published_version_is_fetched_with_its_chunks_in_order_whatever_order_they_came_in() -> None:
    async def scenario() -> None:
        store, put = make_store()
        manifest, chunks = publication(7)
        await send(store, manifest, chunks, [2, 0, 1])
        await store.publish(manifest)

        found, refs = await store.fetch(7)
        assert found == manifest
        tensors = unpack(found, [chunk for _, chunk in refs])
        assert {name: t.tolist() for name, t in tensors.items()} == {f"w{i}": [70.0 + i] * 4 for i in range(3)}
        assert len(put) == 3  # each was put once, by the store

    run(scenario())


def test_a_version_with_a_missing_chunk_is_not_published_until_it_is_sent() -> None:
    async def scenario() -> None:
        store, _ = make_store()
        manifest, chunks = publication(7)
        await send(store, manifest, chunks, [1])
        assert await refused(store.publish(manifest)) == (
            "policy version 7 cannot be published: all 3 chunks must have arrived, missing [0, 2]; send them again"
        )
        assert await refused(store.fetch(7)) == (
            "policy version 7 must be in the store, which has none; pull the newest"
        )
        await send(store, manifest, chunks, [0, 2])
        await store.publish(manifest)
        assert (await store.fetch(7))[0] == manifest

    run(scenario())


def test_a_chunk_that_is_sent_again_replaces_the_first() -> None:
    async def scenario() -> None:
        store, _ = make_store()
        manifest, chunks = publication(7)
        await store.add_chunk(7, 1, chunks[0])
        await send(store, manifest, chunks, [0, 1, 2])
        await store.publish(manifest)
        _, refs = await store.fetch(7)
        unpack(manifest, [chunk for _, chunk in refs])  # every hash fits

    run(scenario())


def test_only_the_newest_versions_are_kept() -> None:
    async def scenario() -> None:
        store, _ = make_store(keep=2)
        for version in (3, 5, 8):
            manifest, chunks = publication(version)
            await send(store, manifest, chunks, [0, 1, 2])
            await store.publish(manifest)
        assert await refused(store.fetch(3)) == (
            "policy version 3 must be in the store, which has [5, 8]; pull the newest"
        )
        assert [(await store.fetch(v))[0].version for v in (5, 8)] == [5, 8]

    run(scenario())


def test_versions_do_not_mix_their_chunks() -> None:
    async def scenario() -> None:
        store, _ = make_store()
        (old, old_chunks), (new, new_chunks) = publication(1), publication(2)
        await asyncio.gather(send(store, old, old_chunks, [0, 1]), send(store, new, new_chunks, [2, 1, 0]))
        await store.publish(new)
        assert await refused(store.publish(old)) == (
            "policy version 1 cannot be published: all 3 chunks must have arrived, missing [0, 1, 2]; send them again"
        )  # what a dead learner left behind went with the next publication
        _, refs = await store.fetch(2)
        unpack(new, [chunk for _, chunk in refs])

    run(scenario())


def test_references_are_handed_out_and_never_the_data() -> None:
    async def scenario() -> None:
        store = PolicyStore(1, lambda chunk: "reference")
        manifest, chunks = publication(0)
        await send(store, manifest, chunks, [0, 1, 2])
        await store.publish(replace(manifest, step=5))
        assert await store.fetch(0) == (replace(manifest, step=5), ["reference"] * 3)

    run(scenario())
