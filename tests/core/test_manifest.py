"""Packing weights into chunks, and out of them again."""

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distrl.errors import PolicyError
from distrl.manifest import manifest_sha256, pack, unpack
from tests.builders import refusal


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embedding": torch.randn(5, 3, generator=generator),
        "half": torch.randn(7, generator=generator).to(torch.bfloat16),
        "double": torch.randn(2, 2, generator=generator, dtype=torch.float64),
        "ids": torch.tensor([2**40, -1, 0]),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }


@pytest.mark.parametrize("chunk_bytes", [1, 24, 64, 1 << 20])
def test_every_tensor_comes_back_bit_by_bit(chunk_bytes: int) -> None:
    tensors = weights()
    manifest, chunks = pack(tensors, version=4, step=3, chunk_bytes=chunk_bytes)
    found = unpack(manifest, chunks)

    assert (manifest.version, manifest.step) == (4, 3)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def test_chunks_are_as_large_as_allowed_and_a_larger_tensor_has_one_of_its_own() -> None:
    tensors = {name: torch.zeros(n, dtype=torch.uint8) for name, n in zip("abcde", (3, 4, 20, 5, 5), strict=True)}
    manifest, chunks = pack(tensors, version=0, step=0, chunk_bytes=10)

    assert [chunk.nbytes for chunk in chunks] == [7, 20, 10]
    assert [(e.name, e.chunk, e.offset) for e in manifest.tensors] == [
        ("a", 0, 0),
        ("b", 0, 3),
        ("c", 1, 0),
        ("d", 2, 0),
        ("e", 2, 5),
    ]


def test_the_recorded_hash_is_that_of_the_tensor_s_bytes() -> None:
    tensor = torch.tensor([1.0, -2.0])
    manifest, _ = pack({"x": tensor}, version=0, step=0)
    # 1.0 and -2.0 in IEEE single precision, little endian
    assert manifest.tensors[0].sha256 == hashlib.sha256(bytes.fromhex("0000803f 000000c0")).hexdigest()


def test_neither_chunks_nor_results_share_memory_with_what_they_came_from() -> None:
    tensor = torch.ones(3)
    manifest, chunks = pack({"x": tensor}, version=0, step=0)
    tensor.zero_()  # the learner's next step
    first = unpack(manifest, chunks)["x"]
    first.fill_(7)  # an engine writes into what it got

    assert unpack(manifest, chunks)["x"].tolist() == [1, 1, 1]


def test_chunks_may_be_read_only() -> None:
    manifest, chunks = pack(weights(), version=0, step=0)
    for chunk in chunks:
        chunk.flags.writeable = False  # as they come out of the object store
    assert torch.equal(unpack(manifest, chunks)["ids"], weights()["ids"])


@pytest.mark.parametrize("name", ["embedding", "half", "ids", "mask", "scalar", "transposed"])
def test_one_flipped_bit_names_the_tensor_that_it_is_in(name: str) -> None:
    manifest, chunks = pack(weights(), version=4, step=3, chunk_bytes=64)
    entry = next(e for e in manifest.tensors if e.name == name)
    chunks[entry.chunk][entry.offset + entry.bytes - 1] ^= 1
    damaged = chunks[entry.chunk][entry.offset : entry.offset + entry.bytes].tobytes()

    assert refusal(PolicyError, lambda: unpack(manifest, chunks)) == (
        f"policy version 4: tensor {name} must have sha256 {entry.sha256}, got "
        f"{hashlib.sha256(damaged).hexdigest()}; the bytes were damaged on the way, publish the version again"
    )


def test_a_truncated_chunk_names_the_tensor_that_it_cuts() -> None:
    manifest, chunks = pack({"a": torch.zeros(2), "b": torch.zeros(2)}, version=4, step=3)
    assert refusal(PolicyError, lambda: unpack(manifest, [chunks[0][:15]])) == (
        "policy version 4: tensor b must lie inside its chunk; chunk 0 of 1 is too short for bytes 8 to 16; "
        "publish the version again"
    )


def test_a_missing_chunk_names_the_first_tensor_in_it() -> None:
    manifest, chunks = pack({"a": torch.zeros(2), "b": torch.zeros(2)}, version=4, step=3, chunk_bytes=8)
    assert refusal(PolicyError, lambda: unpack(manifest, chunks[:1])) == (
        "policy version 4: tensor b must lie inside its chunk; chunk 1 of 1 is too short for bytes 0 to 8; "
        "publish the version again"
    )


def test_equal_weights_have_equal_manifests_whatever_version_order_and_chunks() -> None:
    tensors = weights()
    reordered = dict(reversed(tensors.items()))
    one, _ = pack(tensors, version=1, step=1)
    other, _ = pack(reordered, version=9, step=2, chunk_bytes=24)
    assert one.sha256 == other.sha256 == manifest_sha256(one.tensors)


def test_a_manifest_s_hash_sees_value_name_shape_and_dtype() -> None:
    (entry,) = pack({"x": torch.zeros(4)}, version=0, step=0)[0].tensors
    changed = [
        entry,
        replace(entry, name="y"),
        replace(entry, shape=(2, 2)),
        replace(entry, dtype="int32"),
        replace(entry, sha256="00" * 32),
    ]
    assert len({manifest_sha256([e]) for e in changed}) == len(changed)
