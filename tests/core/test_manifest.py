"""Packing weights into chunks, and out of them again."""

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distrl.errors import DamagedWeightsError
from distrl.manifest import CHUNK_BYTES, cut, describe, lay_out, manifest_sha256, unpack
from distrl.messages import Chunk, Layout, Manifest, Span
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


def pack(
    tensors: dict[str, Tensor], *, version: int, step: int, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Manifest, Layout, list[Chunk]]:
    """A whole publication."""
    manifest = describe(tensors, version=version, step=step)
    layout = lay_out(manifest.tensors, chunk_bytes)
    return manifest, layout, list(cut(tensors, layout))


@pytest.mark.parametrize("chunk_bytes", [1, 24, 64, 1 << 20])
def test_every_tensor_comes_back_bit_by_bit(chunk_bytes: int) -> None:
    tensors = weights()
    manifest, layout, chunks = pack(tensors, version=4, step=3, chunk_bytes=chunk_bytes)
    found = unpack(manifest, layout, chunks)

    assert (manifest.version, manifest.step) == (4, 3)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def test_chunks_are_full_but_the_last_and_a_tensor_goes_on_in_the_next() -> None:
    tensors = {name: torch.zeros(n, dtype=torch.uint8) for name, n in zip("abcde", (3, 4, 20, 5, 0), strict=True)}
    _, layout, chunks = pack(tensors, version=0, step=0, chunk_bytes=10)

    assert [chunk.nbytes for chunk in chunks] == [10, 10, 10, 2]  # 32 bytes in all
    assert layout == {
        "a": (Span(0, 0, 3),),
        "b": (Span(0, 3, 4),),
        "c": (Span(0, 7, 3), Span(1, 0, 10), Span(2, 0, 7)),
        "d": (Span(2, 7, 3), Span(3, 0, 2)),
        "e": (),
    }


def test_a_chunk_is_made_when_it_is_asked_for_and_not_before() -> None:
    tensors = {"a": torch.zeros(4, dtype=torch.uint8), "b": torch.zeros(4, dtype=torch.uint8)}
    chunks = cut(tensors, lay_out(describe(tensors, version=0, step=0).tensors, 4))
    next(chunks)
    tensors["b"].fill_(7)
    assert next(chunks).tolist() == [7, 7, 7, 7]


def test_a_part_of_the_tensors_is_packed_and_unpacked_alone() -> None:
    tensors = weights()
    manifest = describe(tensors, version=1, step=1)
    layout = lay_out([e for e in manifest.tensors if e.name in ("half", "mask")], 8)
    found = unpack(manifest, layout, list(cut(tensors, layout)))
    assert list(found) == ["half", "mask"]
    assert torch.equal(found["half"], tensors["half"])


def test_the_recorded_hash_is_that_of_the_tensor_s_bytes() -> None:
    tensor = torch.tensor([1.0, -2.0])
    manifest = describe({"x": tensor}, version=0, step=0)
    # 1.0 and -2.0 in IEEE single precision, little endian
    assert manifest.tensors[0].sha256 == hashlib.sha256(bytes.fromhex("0000803f 000000c0")).hexdigest()


def test_neither_chunks_nor_results_share_memory_with_what_they_came_from() -> None:
    tensor = torch.ones(3)
    manifest, layout, chunks = pack({"x": tensor}, version=0, step=0)
    tensor.zero_()  # the learner's next step
    first = unpack(manifest, layout, chunks)["x"]
    first.fill_(7)  # an engine writes into what it got

    assert unpack(manifest, layout, chunks)["x"].tolist() == [1, 1, 1]


def test_chunks_may_be_read_only() -> None:
    manifest, layout, chunks = pack(weights(), version=0, step=0)
    for chunk in chunks:
        chunk.flags.writeable = False  # as they come out of the object store
    assert torch.equal(unpack(manifest, layout, chunks)["ids"], weights()["ids"])


@pytest.mark.parametrize("name", ["embedding", "half", "ids", "mask", "scalar", "transposed"])
def test_one_flipped_bit_names_the_tensor_that_it_is_in(name: str) -> None:
    manifest, layout, chunks = pack(weights(), version=4, step=3, chunk_bytes=64)
    entry = next(e for e in manifest.tensors if e.name == name)
    last = layout[name][-1]
    chunks[last.chunk][last.offset + last.bytes - 1] ^= 1
    damaged = b"".join(chunks[s.chunk][s.offset : s.offset + s.bytes].tobytes() for s in layout[name])

    assert refusal(DamagedWeightsError, lambda: unpack(manifest, layout, chunks)) == (
        f"policy version 4: tensor {name} must have sha256 {entry.sha256}, got "
        f"{hashlib.sha256(damaged).hexdigest()}; the bytes were damaged on the way, publish the version again"
    )


def test_a_truncated_chunk_names_the_tensor_that_it_cuts() -> None:
    manifest, layout, chunks = pack({"a": torch.zeros(2), "b": torch.zeros(2)}, version=4, step=3)
    assert refusal(DamagedWeightsError, lambda: unpack(manifest, layout, [chunks[0][:15]])) == (
        "policy version 4: tensor b must lie inside its chunks; chunk 0 of 1 is too short for bytes 8 to 16; "
        "publish the version again"
    )


def test_a_missing_chunk_names_the_first_tensor_in_it() -> None:
    manifest, layout, chunks = pack({"a": torch.zeros(2), "b": torch.zeros(2)}, version=4, step=3, chunk_bytes=8)
    assert refusal(DamagedWeightsError, lambda: unpack(manifest, layout, chunks[:1])) == (
        "policy version 4: tensor b must lie inside its chunks; chunk 1 of 1 is too short for bytes 0 to 8; "
        "publish the version again"
    )


def test_a_shape_that_does_not_fit_the_bytes_names_the_tensor() -> None:
    manifest, layout, chunks = pack({"x": torch.zeros(4)}, version=4, step=3)
    wrong = replace(manifest, tensors=(replace(manifest.tensors[0], shape=(5,)),))
    assert refusal(DamagedWeightsError, lambda: unpack(wrong, layout, chunks)) == (
        "policy version 4: tensor x must have 20 bytes for shape [5] and type float32, got 16; "
        "publish the version again"
    )


def test_equal_weights_have_equal_manifests_whatever_version_and_order() -> None:
    tensors = weights()
    reordered = dict(reversed(tensors.items()))
    one = describe(tensors, version=1, step=1)
    other = describe(reordered, version=9, step=2)
    assert one.sha256 == other.sha256 == manifest_sha256(one.tensors)


def test_a_manifest_s_hash_sees_value_name_shape_and_dtype() -> None:
    (entry,) = describe({"x": torch.zeros(4)}, version=0, step=0).tensors
    changed = [
        entry,
        replace(entry, name="y"),
        replace(entry, shape=(2, 2)),
        replace(entry, dtype="int32"),
        replace(entry, sha256="00" * 32),
    ]
    assert len({manifest_sha256([e]) for e in changed}) == len(changed)
