"""Policy weights as bytes: a manifest that says what they hash to, chunks that carry them, and the check of both.

A publication goes in bounded chunks, so that neither the learner nor the policy store needs room for a second copy of
the whole policy. `describe` hashes, `lay_out` says what goes where, `cut` makes one chunk at a time, and `unpack` puts
verified tensors together again.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from distrl.errors import DamagedWeightsError
from distrl.messages import Chunk, Layout, Manifest, Span, TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 64 << 20
"""Upper bound of a chunk."""

HASHING_THREADS = 8


def describe(tensors: "Mapping[str, Tensor]", *, version: int, step: int, weights: str = "policy") -> Manifest:
    """The manifest of some weights; reads every byte of them once.

    Args:
        weights: whose they are, see `distrl.tickets.weights_of`.
    """

    def entry(name: str, tensor: "Tensor") -> TensorEntry:
        data = tensor_bytes(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest = hashlib.sha256(data.data).hexdigest()
        return TensorEntry(name, dtype, tuple(tensor.shape), data.nbytes, digest)

    with _threads() as threads:
        entries = list(threads.map(entry, tensors, tensors.values()))
    return Manifest(version, step, tuple(entries), manifest_sha256(entries), weights)


def lay_out(entries: Iterable[TensorEntry], chunk_bytes: int = CHUNK_BYTES) -> dict[str, tuple[Span, ...]]:
    """Fills chunks of `chunk_bytes` with tensors in order; what does not fit goes on in the next chunk."""
    layout: dict[str, tuple[Span, ...]] = {}
    chunk = used = 0
    for entry in entries:
        spans, left = [], entry.bytes
        while left:
            if used == chunk_bytes:
                chunk, used = chunk + 1, 0
            taken = min(left, chunk_bytes - used)
            spans.append(Span(chunk, used, taken))
            used, left = used + taken, left - taken
        layout[entry.name] = tuple(spans)
    return layout


def cut(tensors: "Mapping[str, Tensor]", layout: Layout) -> Iterator[Chunk]:
    """The chunks of a layout in order, each a copy, made when it is asked for."""
    size = 0
    parts: list[Chunk] = []
    for name, spans in layout.items():
        data, start = tensor_bytes(tensors[name]), 0
        for span in spans:
            if span.offset == 0 and size:
                yield np.concatenate(parts)
                parts, size = [], 0
            parts.append(data[start : start + span.bytes])
            start, size = start + span.bytes, size + span.bytes
    if size:
        yield np.concatenate(parts)


def unpack(manifest: Manifest, layout: Layout, chunks: Sequence[Chunk]) -> "dict[str, Tensor]":
    """The tensors of a layout, copied out of the chunks and compared with their hashes.

    Raises:
        DamagedWeightsError: a span does not lie inside its chunk, or a tensor's bytes do not have the manifest's
            length or hash; the message names the version and the tensor.
    """
    chosen = _chosen(manifest, layout)
    with _threads() as threads:
        tensors = list(threads.map(lambda entry: _unpack_one(manifest, entry, layout, chunks), chosen))
    return {entry.name: tensor for entry, tensor in zip(chosen, tensors, strict=True)}


def _threads() -> ThreadPoolExecutor:
    """Hashing and copying let go of the interpreter's lock; one thread would do 1 to 2 GB/s of it."""
    return ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1), thread_name_prefix="hash")


def _chosen(manifest: Manifest, layout: Layout) -> list[TensorEntry]:
    return [entry for entry in manifest.tensors if entry.name in layout]


def _unpack_one(manifest: Manifest, entry: TensorEntry, layout: Layout, chunks: Sequence[Chunk]) -> "Tensor":
    import torch

    where = f"policy version {manifest.version}: tensor {entry.name}"
    for span in layout[entry.name]:
        if span.chunk >= len(chunks) or span.offset + span.bytes > chunks[span.chunk].nbytes:
            raise DamagedWeightsError(
                f"{where} must lie inside its chunks; chunk {span.chunk} of {len(chunks)} is too short for bytes "
                f"{span.offset} to {span.offset + span.bytes}; publish the version again"
            )
    spans = layout[entry.name]
    # concatenate copies: the chunks of an object store are read-only, and an engine may keep what it gets.
    data = np.concatenate([chunks[s.chunk][s.offset : s.offset + s.bytes] for s in spans] or [np.empty(0, np.uint8)])
    found = hashlib.sha256(data.data).hexdigest()
    if found != entry.sha256:
        raise DamagedWeightsError(
            f"{where} must have sha256 {entry.sha256}, got {found}; the bytes were damaged on the way, "
            "publish the version again"
        )
    dtype = getattr(torch, entry.dtype)
    if entry.bytes != math.prod(entry.shape) * dtype.itemsize:
        raise DamagedWeightsError(
            f"{where} must have {math.prod(entry.shape) * dtype.itemsize} bytes for shape {list(entry.shape)} and "
            f"type {entry.dtype}, got {entry.bytes}; publish the version again"
        )
    # Bytes of a tensor without elements cannot be viewed as another type.
    flat = torch.from_numpy(data).view(dtype) if entry.bytes else torch.empty(0, dtype=dtype)
    return flat.reshape(entry.shape)


def tensor_bytes(tensor: "Tensor") -> Chunk:
    """The bytes of a tensor; shares its memory where it lies contiguous on the CPU."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def manifest_sha256(entries: Sequence[TensorEntry]) -> str:
    """Hash over names, types, shapes and hashes of the tensors: equal for equal weights, whatever the version."""
    digest = hashlib.sha256()
    for entry in sorted(entries, key=lambda e: e.name):
        digest.update(repr((entry.name, entry.dtype, entry.shape, entry.sha256)).encode())
    return digest.hexdigest()
