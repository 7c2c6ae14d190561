"""Packs policy weights into byte chunks with a table of contents, and unpacks them again, every tensor verified."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from distrl.errors import PolicyError
from distrl.messages import Chunk, Manifest, TensorEntry

CHUNK_BYTES = 64 << 20
"""Upper bound of a chunk, unless one tensor alone is larger."""


def pack(
    tensors: Mapping[str, Tensor], *, version: int, step: int, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Manifest, list[Chunk]]:
    """Copies tensors into chunks of at most `chunk_bytes`.

    Returns:
        The manifest and the chunks it points into, uint8 arrays.
    """
    entries: list[TensorEntry] = []
    parts: list[list[Chunk]] = [[]]
    sizes = [0]
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if sizes[-1] and sizes[-1] + flat.nbytes > chunk_bytes:
            parts.append([])
            sizes.append(0)
        entries.append(
            TensorEntry(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                chunk=len(parts) - 1,
                offset=sizes[-1],
                bytes=flat.nbytes,
                sha256=hashlib.sha256(flat.data).hexdigest(),
            )
        )
        parts[-1].append(flat)
        sizes[-1] += flat.nbytes
    chunks = [np.concatenate(part) if part else np.empty(0, np.uint8) for part in parts]
    return Manifest(version, step, tuple(entries), manifest_sha256(entries)), chunks


def unpack(manifest: Manifest, chunks: Sequence[Chunk]) -> dict[str, Tensor]:
    """The tensors of a publication, copied out of the chunks.

    Raises:
        PolicyError: an entry does not lie inside its chunk or its bytes do not have the recorded hash; the message
            names the version and the tensor.
    """
    tensors = {}
    for entry in manifest.tensors:
        where = f"policy version {manifest.version}: tensor {entry.name}"
        if entry.chunk >= len(chunks) or entry.offset + entry.bytes > chunks[entry.chunk].nbytes:
            raise PolicyError(
                f"{where} must lie inside its chunk; chunk {entry.chunk} of {len(chunks)} is too short for bytes "
                f"{entry.offset} to {entry.offset + entry.bytes}; publish the version again"
            )
        data = chunks[entry.chunk][entry.offset : entry.offset + entry.bytes].copy()
        found = hashlib.sha256(data.data).hexdigest()
        if found != entry.sha256:
            raise PolicyError(
                f"{where} must have sha256 {entry.sha256}, got {found}; the bytes were damaged on the way, "
                "publish the version again"
            )
        dtype = getattr(torch, entry.dtype)
        # Bytes of a tensor without elements cannot be viewed as another type.
        flat = torch.from_numpy(data).view(dtype) if entry.bytes else torch.empty(0, dtype=dtype)
        tensors[entry.name] = flat.reshape(entry.shape)
    return tensors


def manifest_sha256(entries: Sequence[TensorEntry]) -> str:
    """Hash over names, types, shapes and hashes of the tensors: equal for equal weights, whatever the version."""
    digest = hashlib.sha256()
    for entry in sorted(entries, key=lambda e: e.name):
        digest.update(repr((entry.name, entry.dtype, entry.shape, entry.sha256)).encode())
    return digest.hexdigest()
