"""The policy store: owns the published weights, so that they outlive the learner that made them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from distrl.errors import LostWeightsError, PolicyError
from distrl.messages import Chunk, Content, Delivery, Layout, Manifest, Offer, Span, TensorEntry
from distrl.tickets import POLICY_WEIGHTS

_Key = tuple[str, int]
"""Whose weights, and which version of them."""


@dataclass(slots=True)
class _Stored:
    """A chunk in the object store; `bytes` were filled when it was published."""

    reference: Any
    bytes: int


@dataclass(frozen=True, slots=True)
class _Piece:
    stored: _Stored
    offset: int
    bytes: int


class PolicyStore:
    """Keeps the newest versions of the policy, and of other named weights.

    Chunks arrive by value and are put into the object store by this process.

    Tensors are known by their content: one that did not change since an older version is neither sent again by the
    learner nor fetched again by an actor that has it.

    Args:
        keep: how many published versions are kept; an actor that pulls an older one is told the newest.
        put: makes the reference that readers fetch; `ray.put` in an actor. What the store puts, the store owns.
    """

    def __init__(self, keep: int, put: Callable[[Chunk], Any]) -> None:
        self._keep = keep
        self._put = put
        self._arriving: dict[_Key, dict[int, _Stored]] = {}
        self._published: dict[_Key, Manifest] = {}
        self._offers: dict[_Key, Offer] = {}
        self._tensors: dict[Content, tuple[_Piece, ...]] = {}

    @ray.method
    async def wanted(self, manifest: Manifest) -> frozenset[str]:
        """Names of the tensors whose bytes the store lacks.

        A tensor in a chunk of which less than half is still in use counts as lacking, so that sending it again lets
        the chunk go: what the store keeps stays below twice what it publishes.
        """
        names = {entry.content: entry.name for entry in manifest.tensors}  # equal tensors are sent once
        used = self._used({*names, *(entry.content for entry in self._entries())})
        return frozenset(
            name
            for content, name in names.items()
            if content not in self._tensors
            or any(2 * used[id(piece.stored)] < piece.stored.bytes for piece in self._tensors[content])
        )

    @ray.method
    async def add_chunk(self, weights: str, version: int, index: int, chunk: Chunk) -> None:
        """Takes one chunk of a version that is being published; sending it again replaces it."""
        self._arriving.setdefault((weights, version), {})[index] = _Stored(self._put(chunk), chunk.nbytes)

    @ray.method
    async def publish(self, manifest: Manifest, layout: Layout) -> None:
        """Makes a version available.

        Args:
            layout: of the tensors that were sent, in the version's own chunks. They replace what the store has.
        Raises:
            PolicyError: a chunk or a tensor is missing; nothing is published, and older versions stay.
        """
        key = (manifest.weights, manifest.version)
        arrived = self._arriving.get(key, {})
        wanted = {span.chunk for spans in layout.values() for span in spans}
        where = f"{manifest.weights} version {manifest.version} cannot be published:"
        if missing := sorted(wanted - set(arrived)):
            raise PolicyError(f"{where} all {len(wanted)} chunks must have arrived, missing {missing}; send them again")
        here = {e.content for e in manifest.tensors if e.name in layout} | self._tensors.keys()
        if lacking := next((e.name for e in manifest.tensors if e.content not in here), None):
            raise LostWeightsError(
                f"{where} the store must have every tensor that is not sent, tensor {lacking} is neither here nor "
                "sent; send the whole policy"
            )
        self._arriving.pop(key, None)
        for entry in manifest.tensors:
            if entry.name in layout:
                spans = layout[entry.name]
                self._tensors[entry.content] = tuple(_Piece(arrived[s.chunk], s.offset, s.bytes) for s in spans)
        self._published[key] = manifest
        self._forget()

    @ray.method
    async def offer(self, manifest: Manifest, offer: Offer) -> None:
        """Makes a version available whose bytes the learner sends to who asks it; here they arrive later."""
        key = (manifest.weights, manifest.version)
        self._published[key] = manifest
        self._offers[key] = offer
        self._forget()

    def _forget(self) -> None:
        """Drops old versions, tensors that no version has, and what a learner that died while publishing left."""
        for weights in {weights for weights, _ in self._published}:
            versions = self._versions(weights)
            for old in versions[: -self._keep]:
                del self._published[weights, old]
                self._offers.pop((weights, old), None)
            for key in [k for k in self._arriving if k[0] == weights and k[1] < versions[-1]]:
                del self._arriving[key]
        contents = {entry.content for entry in self._entries()}
        self._tensors = {content: pieces for content, pieces in self._tensors.items() if content in contents}

    @ray.method
    async def fetch(
        self, version: int, have: Mapping[str, Content], weights: str = POLICY_WEIGHTS, from_store: bool = False
    ) -> Delivery:
        """A published version, without the tensors that the caller has.

        Args:
            have: what the caller has under each name. Equal values under another name do not count: the caller would
                have to know where to copy them from.
            from_store: the bytes themselves, also where the learner offers them.
        Raises:
            LostWeightsError: the version is not here (any more), or its bytes are not here (yet).
        """
        if (weights, version) not in self._published:
            raise LostWeightsError(
                f"{weights} version {version} must be in the store, which has {self._versions(weights) or 'none'}; "
                "pull the newest"
            )
        manifest = self._published[weights, version]
        offer = self._offers.get((weights, version))
        if offer is not None and not from_store:
            return Delivery(manifest, {}, (), offer)
        chunks: dict[int, tuple[int, Any]] = {}
        layout = {}
        for entry in manifest.tensors:
            if have.get(entry.name) != entry.content:
                if entry.content not in self._tensors:
                    raise LostWeightsError(
                        f"{weights} version {version} must have its bytes in the store, tensor {entry.name} is only "
                        "offered by the learner; wait for it"
                    )
                spans = []
                for piece in self._tensors[entry.content]:
                    index, _ = chunks.setdefault(id(piece.stored), (len(chunks), piece.stored.reference))
                    spans.append(Span(index, piece.offset, piece.bytes))
                layout[entry.name] = tuple(spans)
        return Delivery(manifest, layout, tuple(reference for _, reference in chunks.values()))

    @ray.method
    async def held(self) -> dict[str, int]:
        """Versions, chunks and bytes that the store keeps, those of unfinished publications included."""
        chunks = {id(p.stored): p.stored for pieces in self._tensors.values() for p in pieces}
        chunks |= {id(stored): stored for arrived in self._arriving.values() for stored in arrived.values()}
        return {
            "versions": len(self._published),
            "chunks": len(chunks),
            "bytes": sum(stored.bytes for stored in chunks.values()),
        }

    def _versions(self, weights: str) -> list[int]:
        return sorted(version for name, version in self._published if name == weights)

    def _entries(self) -> list[TensorEntry]:
        return [entry for manifest in self._published.values() for entry in manifest.tensors]

    def _used(self, contents: Collection[Content]) -> dict[int, int]:
        """Bytes of each chunk that some of these contents need."""
        used: dict[int, int] = {}
        for content in contents:
            for piece in self._tensors.get(content, ()):
                used[id(piece.stored)] = used.get(id(piece.stored), 0) + piece.bytes
        return used
