"""What actors and learners tell each other beside record batches: small, picklable, frozen."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Chunk = NDArray[np.uint8]
"""Bytes of a published policy version."""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Which process somebody is."""

    pid: int
    host: str
    node: str
    """Ray's id of the node; empty outside Ray."""
    started_ns: int
    """When it was started, in nanoseconds since the epoch: with host and pid it names a process."""


@dataclass(frozen=True, slots=True)
class LearnerStart:
    """What a learner process is told when it begins."""

    session: int
    """To be given with its calls, so that those of a process that it replaces can be told apart."""
    checkpoint: str | None
    """Directory of the checkpoint that the ledger named last, None where there is none."""
    publish: bool
    """Whether the weights that it loads have to be published before the first step, under a new version; not where
    they are those that were published last."""


@dataclass(frozen=True, slots=True)
class GenerationReceipt:
    """A ticket was sampled; its rollouts are in the batch that came with this receipt."""

    ticket_id: int
    rollouts: int
    response_tokens: int
    truncated: int
    """Rollouts cut at `max_new_tokens`."""
    versions: tuple[int, ...]
    """All policy versions that sampled one of its tokens, in order; none where another run sampled it."""
    bytes: int
    """Size of the batch in the object store."""
    started_s: float
    finished_s: float

    @property
    def oldest_version(self) -> int:
        return self.versions[0]

    @property
    def newest_version(self) -> int:
        return self.versions[-1]


@dataclass(frozen=True, slots=True)
class GradingReceipt:
    """Some tickets were graded; one entry per ticket, in the order they were given."""

    reward_sums: tuple[float, ...]
    correct: tuple[int, ...]
    rollouts: tuple[int, ...]
    components: tuple[Mapping[str, float], ...]
    """Means over the ticket's rollouts, by name."""
    failures: tuple[str | None, ...]
    """Why a ticket could not be graded; its rollouts are not in the batch, and its numbers are 0."""
    bytes: int
    started_s: float
    finished_s: float


@dataclass(frozen=True, slots=True)
class ReferenceReceipt:
    """Some tickets were scored by the reference model."""

    tokens: int
    bytes: int
    started_s: float
    finished_s: float


@dataclass(frozen=True, slots=True)
class JournalReceipt:
    """A ticket's rollouts are on disk in this file."""

    path: str
    sha256: str
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class LoadReceipt:
    """A generation actor now samples from `version`."""

    version: int
    fetch_s: float
    """Seconds to fetch and verify, while sampling went on."""
    pause_s: float
    """Seconds in which no token was sampled."""
    sequences_in_flight: int
    moved_bytes: int = 0
    """Bytes of the tensors that were fetched; those that the actor had already did not move."""
    moved_tensors: int = 0
    transport: str = "store"
    """The way that the bytes came."""
    fallback: str | None = None
    """Why it was not the one that the learner offered."""


Content = tuple[str, tuple[int, ...], str]
"""Type, shape and hash of a tensor: equal for two tensors that hold the same values."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a policy: what it is called and what it must hash to."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str

    @property
    def content(self) -> Content:
        return self.dtype, self.shape, self.sha256


@dataclass(frozen=True, slots=True)
class Manifest:
    """The table of contents of one published policy version. Where the bytes lie is not part of it."""

    version: int
    step: int
    tensors: tuple[TensorEntry, ...]
    sha256: str
    """Hash over the entries; two manifests with the same hash hold the same weights."""
    weights: str = "policy"
    """Whose they are: see `distrl.tickets.weights_of`. Versions of different weights have nothing to do with each
    other; equal tensors are kept once all the same."""


@dataclass(frozen=True, slots=True)
class Span:
    """Some bytes of a tensor: `bytes` of them from `offset` in chunk number `chunk` of a message."""

    chunk: int
    offset: int
    bytes: int


Layout = Mapping[str, tuple[Span, ...]]
"""Where tensors lie in the chunks of a message, by name; a tensor larger than a chunk lies in several."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Where the learner sends the bytes of a version from, beside the policy store."""

    transport: str
    host: str
    port: int
    key: bytes = field(repr=False)
    """Shared secret of both sides."""
    node: str
    """Ray's id of the machine."""
    pid: int
    """Of the learner's process."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the policy store answers an actor that pulls a version: the tensors that it does not have yet."""

    manifest: Manifest
    layout: Layout
    """Of the tensors that must move; the others are what the actor said it had."""
    chunks: tuple[object, ...]
    """References to the chunks that `layout` counts."""
    offer: Offer | None = None
    """Where all of them can be had instead; `layout` is empty then."""


@dataclass(frozen=True, slots=True)
class PublishAgain:
    """Asks the learner for the weights that it published last: the policy store has lost or damaged them."""

    version: int
    step: int


@dataclass(frozen=True, slots=True)
class TicketGrant:
    """One ticket of a batch for the learner: references to the columns of its stages, never the data."""

    ticket_id: int
    generation: object
    grading: object
    reference: object | None
    staleness: int | None
    """Optimizer steps; None where another run sampled it, whose versions are none of this run."""


@dataclass(frozen=True, slots=True)
class BatchGrant:
    """The tickets that one optimizer step trains, in the order of their ids."""

    step: int
    """Number of the step, the first is 1."""
    tickets: tuple[TicketGrant, ...]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    """Number of the step, the first is 1."""
    wait_s: float
    """Seconds the learner waited for the batch."""
    train_s: float
    """Seconds from receiving the batch to the new weights."""
    last_publish_s: float
    """Seconds that the step before took after its new weights were there: to copy or publish them, to wait for the
    publication before, and to checkpoint. What is published beside the next step is not in it."""
    metrics: Mapping[str, float]
    held_s: float = 0.0
    """Seconds that the learner waited, after training, for the weights of the step before to be published."""
    skipped: str | None = None
    """Why the step left the weights as they were, where it did; names its tickets."""
