"""Weights in a file in shared memory: written once by the generation actor, mapped by every process of its engine.

On one machine this replaces sending the bytes to each of them. The file is gone as soon as the engine has them.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrl.errors import PolicyError

SHARED_MEMORY = Path("/dev/shm")
"""Where a file is memory; elsewhere the system's temporary folder does, more slowly."""

ALIGNMENT = 64
"""Bytes that every tensor begins at a multiple of, so that it can be viewed as any dtype."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Where one tensor lies in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@contextlib.contextmanager
def shared_weights(version: int, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Path, list[Placed]]]:
    """Writes tensors to a new file and removes it when the block ends.

    Raises:
        PolicyError: what can be read back from the file is not what was written; names the tensor.
    """
    folder = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    handle, name = tempfile.mkstemp(prefix="distrl-weights-", dir=folder)
    os.close(handle)
    path = Path(name)
    try:
        placed = write_weights(path, tensors)
        _check_written(version, path, placed, tensors)
        yield path, placed
    finally:
        path.unlink(missing_ok=True)


def map_weights(path: str, placed: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors of such a file, as views into it; writing to one changes nobody's memory but the writer's.

    Args:
        placed: `Placed` as mappings, which is how they travel.
    Raises:
        PolicyError: the file is shorter than an entry says, or an entry's size does not follow from shape and dtype.
    """
    # Copy-on-write: torch warns of arrays that are read-only.
    memory = np.memmap(path, dtype=np.uint8, mode="c") if Path(path).stat().st_size else np.empty(0, np.uint8)
    return {entry["name"]: _view(memory, entry) for entry in placed}


def _view(memory: Any, entry: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, entry["dtype"])
    shape, offset, size = tuple(entry["shape"]), entry["offset"], entry["bytes"]
    wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size != wanted or offset + size > memory.nbytes:
        raise PolicyError(
            f"tensor {entry['name']!r} of {entry['dtype']}{list(shape)} must have {wanted} bytes inside the shared "
            f"file, got bytes {offset} to {offset + size} of {memory.nbytes}; load the version again"
        )
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(memory[offset : offset + size]).view(dtype).reshape(shape)


def _flat(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> list[Placed]:
    """Writes tensors one after the other; what they must lie at to be mapped."""
    placed: list[Placed] = []
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            flat = _flat(tensor)
            dtype = str(tensor.dtype).removeprefix("torch.")
            placed.append(Placed(name, dtype, tuple(tensor.shape), file.tell(), flat.nbytes))
            file.write(flat.data)
    return placed


def _check_written(version: int, path: Path, placed: Sequence[Placed], tensors: Mapping[str, Tensor]) -> None:
    """Here rather than in the engine's processes, which do not sample while they check."""
    memory = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    for entry in placed:
        if not np.array_equal(memory[entry.offset : entry.offset + entry.bytes], _flat(tensors[entry.name])):
            raise PolicyError(
                f"policy version {version}: tensor {entry.name!r} must lie in shared memory as it was written, "
                "got other bytes; look for a full or faulty memory and load the version again"
            )
