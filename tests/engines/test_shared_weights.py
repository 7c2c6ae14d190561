"""Weights in a shared file: what was written is mapped, and a file that lies is refused by the name of the tensor."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from actors.engines import shared_weights
from actors.engines.shared_weights import map_weights
from distrl.errors import PolicyError
from tests.builders import refusal

TENSORS = {
    "odd": torch.arange(7, dtype=torch.float32) / 3,
    "half": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4).t(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "nothing": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
}


def test_every_dtype_and_layout_comes_back_and_the_file_goes() -> None:
    with shared_weights.shared_weights(3, TENSORS) as (path, placed):
        mapped = map_weights(str(path), [asdict(entry) for entry in placed])
        assert mapped.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert mapped[name].dtype == tensor.dtype
            assert torch.equal(mapped[name], tensor), name
    assert not path.exists()


def test_a_set_without_bytes_can_be_mapped() -> None:
    with shared_weights.shared_weights(3, {"nothing": torch.empty(0, 4)}) as (path, placed):
        assert map_weights(str(path), [asdict(entry) for entry in placed])["nothing"].shape == (0, 4)


def test_writing_to_a_mapped_tensor_changes_nobody_elses() -> None:
    with shared_weights.shared_weights(3, TENSORS) as (path, placed):
        entries = [asdict(entry) for entry in placed]
        map_weights(str(path), entries)["odd"].zero_()
        assert torch.equal(map_weights(str(path), entries)["odd"], TENSORS["odd"])


def test_the_file_goes_when_the_load_fails() -> None:
    with pytest.raises(RuntimeError, match="mid-way"), shared_weights.shared_weights(3, TENSORS) as (path, _):
        raise RuntimeError("mid-way")
    assert not path.exists()


def test_a_file_that_was_cut_short_is_refused_by_the_tensor_it_lacks() -> None:
    with shared_weights.shared_weights(3, TENSORS) as (path, placed):
        os.truncate(path, 20)
        assert refusal(PolicyError, lambda: map_weights(str(path), [asdict(placed[0])])) == (
            "tensor 'odd' of float32[7] must have 28 bytes inside the shared file, got bytes 0 to 28 of 20; "
            "load the version again"
        )


def test_a_size_that_does_not_follow_from_shape_and_dtype_is_refused() -> None:
    with shared_weights.shared_weights(3, TENSORS) as (path, placed):
        entry = asdict(replace(placed[0], shape=(6,)))
        # Tensors begin at 0, 64, 128, 192 and 192, and the last has 3 bytes.
        assert refusal(PolicyError, lambda: map_weights(str(path), [entry])) == (
            "tensor 'odd' of float32[6] must have 24 bytes inside the shared file, got bytes 0 to 28 of 195; "
            "load the version again"
        )


def test_bytes_that_do_not_read_back_are_refused_before_anybody_maps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    write = shared_weights.write_weights

    def write_badly(path: Path, tensors: dict[str, torch.Tensor]) -> list[shared_weights.Placed]:
        placed = write(path, tensors)
        data = bytearray(path.read_bytes())
        data[placed[1].offset + 5] ^= 1
        path.write_bytes(data)
        return placed

    monkeypatch.setattr(shared_weights, "write_weights", write_badly)

    def load() -> None:
        with shared_weights.shared_weights(3, TENSORS):
            raise AssertionError("nobody gets this file")

    assert refusal(PolicyError, load) == (
        "policy version 3: tensor 'half' must lie in shared memory as it was written, got other bytes; look for a full "
        "or faulty memory and load the version again"
    )
