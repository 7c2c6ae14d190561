"""The generation actor's side: a process that receives and verifies, and that is killed when it is late."""

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Client, Connection

import numpy as np
from torch import Tensor

from actors.engines.shared_weights import ALIGNMENT
from actors.transfer.child import bounded, end_with_parent, start_child
from actors.transfer.planes import Plane, Receiving, known_plane, prepare, receiving
from actors.transfer.snapshot import memory_file
from distrl.errors import DamagedWeightsError, DeadlineError, StageError
from distrl.manifest import tensor_bytes
from distrl.messages import Chunk, Layout, Manifest, Offer, Span, TensorEntry

GRACE_S = 5.0
"""Seconds after which a receiver ends itself that nobody has killed."""


class Receiver:
    """Has weights received by a process beside this one.

    Args:
        timeout_s: seconds that one update may take, the start of the process included.
    """

    def __init__(self, plane: Plane, timeout_s: float) -> None:
        self._plane = plane
        self._timeout_s = timeout_s
        self._one_at_a_time = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._start()

    def receive(self, offer: Offer, manifest: Manifest, names: Sequence[str]) -> tuple[Layout, list[Chunk]]:
        """Some tensors of a version, verified, as one chunk of bytes and where each lies in it.

        Raises:
            DeadlineError: it took too long; names the learner's process and the version. DamagedWeightsError: bytes
                are not those that were published; names the tensor. StageError: the other side refused, failed or died.
        """
        entries = [entry for entry in manifest.tensors if entry.name in set(names)]
        with self._one_at_a_time:
            connection = self._start()
            descriptor, path = memory_file("distrl-received")
            try:
                self._ask(connection, offer, manifest, entries, path)
                size = os.stat(descriptor).st_size
                memory = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
            finally:
                os.close(descriptor)  # what is mapped stays
        offsets = _offsets(entries)
        return {e.name: (Span(0, offsets[e.name], e.bytes),) if e.bytes else () for e in entries}, [memory]

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _start(self) -> Connection:
        if self.process is not None and self.process.poll() is not None:
            self.close()
        if self._connection is None:
            ours, theirs = Pipe()
            self.process = start_child(__name__, theirs, self._plane, str(self._timeout_s))
            theirs.close()
            self._connection = ours
        return self._connection

    def _ask(
        self, connection: Connection, offer: Offer, manifest: Manifest, entries: Sequence[TensorEntry], path: str
    ) -> None:
        what = f"{manifest.weights} version {manifest.version} over {offer.transport}"
        learner = f"the learner, process {offer.pid} on {offer.host},"
        deadline = time.monotonic() + self._timeout_s
        try:
            connection.send((offer, manifest.weights, manifest.version, entries, path))
            in_time = connection.poll(max(0.0, deadline - time.monotonic()))
            answer = connection.recv() if in_time else None
        except (EOFError, OSError) as error:
            self.close()
            raise StageError(f"{learner} was sending {what}, and the receiving process ended") from error
        if not in_time:
            self.close()
            raise DeadlineError(
                f"{learner} must send {what} within limits.transport_timeout_s = {self._timeout_s:g} s, it did not"
            )
        if isinstance(answer, DamagedWeightsError):
            raise answer
        if answer is not None:
            raise StageError(f"{learner} must send {what}, it did not: {answer}")


class Staged:
    """Writes tensors into a file as they arrive, each compared with its hash."""

    def __init__(self, version: int, entries: Iterable[TensorEntry], path: str) -> None:
        self._version = version
        self._entries = {entry.name: entry for entry in entries}
        self._offsets = _offsets(self._entries.values())
        self._missing = set(self._entries)
        size = sum(-(-entry.bytes // ALIGNMENT) * ALIGNMENT for entry in self._entries.values())
        with open(path, "r+b") as file:
            file.truncate(size)
        self._memory = np.memmap(path, dtype=np.uint8, mode="r+") if size else np.empty(0, np.uint8)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            entry = self._entries[name]
            data = tensor_bytes(tensor)
            found = hashlib.sha256(data.data).hexdigest()
            if found != entry.sha256:
                raise DamagedWeightsError(
                    f"policy version {self._version}: tensor {name} must have sha256 {entry.sha256}, got {found}; the "
                    "bytes were damaged on the way, take the version from the policy store"
                )
            self._memory[self._offsets[name] : self._offsets[name] + entry.bytes] = data
            self._missing.discard(name)

    def check(self) -> None:
        """
        Raises:
            StageError: a tensor has not come.
        """
        if self._missing:
            raise StageError(f"tensor {min(self._missing)} was not sent")


class _Exchanged:
    """A stage that can be another one for the next update, under a plane that is kept."""

    def __init__(self) -> None:
        self.stage: Staged | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        assert self.stage is not None
        self.stage.load_weights(weights)


class _Link:
    """The connection to one sender, and the plane that was met through it."""

    def __init__(self, offer: Offer, plane: Plane, timeout_s: float) -> None:
        self.offer = offer
        self._connection: Connection = Client((offer.host, offer.port), authkey=offer.key)
        self._stage = _Exchanged()
        self._plane: Receiving = receiving(plane, self._stage, timeout_s)

    def receive(self, weights: str, version: int, stage: Staged, names: Sequence[str]) -> None:
        self._stage.stage = stage
        self._connection.send((weights, version, names))
        while True:
            what, info = self._connection.recv()
            if what == "sent":
                stage.check()
                return
            if what == "failed":
                raise StageError(info)
            try:
                (self._plane.init if what == "init" else self._plane.update)(info)
            except Exception as error:
                # The sender may be in a collective that will not end: it must hear of it before this side goes.
                with contextlib.suppress(OSError):
                    self._connection.send(f"{type(error).__name__}: {error}")
                raise
            self._connection.send(None)

    def close(self) -> None:
        self._connection.close()


def receive_jobs(jobs: Connection, plane: Plane, timeout_s: float) -> None:
    """Does what the generation actor asks for, until it goes away."""
    prepare(plane)  # before the first deadline runs
    link: _Link | None = None
    while True:
        try:
            offer, weights, version, entries, path = jobs.recv()
        except EOFError:
            return
        answer: Exception | str | None = None
        with bounded(timeout_s + GRACE_S):
            try:
                if link is None or link.offer != offer:
                    if link is not None:
                        link.close()
                    link = _Link(offer, plane, timeout_s)
                link.receive(weights, version, Staged(version, entries, path), [entry.name for entry in entries])
            except DamagedWeightsError as error:
                answer = error
            except Exception as error:  # noqa: BLE001  (told to the actor, which takes the store)
                answer = f"{type(error).__name__}: {error}"
            if answer is not None and link is not None:
                link.close()
                link = None
        jobs.send(answer)


def _offsets(entries: Iterable[TensorEntry]) -> Mapping[str, int]:
    offsets, at = {}, 0
    for entry in entries:
        offsets[entry.name] = at
        at += -(-entry.bytes // ALIGNMENT) * ALIGNMENT
    return offsets


def main() -> None:
    fd, parent, plane, timeout_s = sys.argv[1:]
    end_with_parent(int(parent))
    with Connection(int(fd)) as jobs:
        receive_jobs(jobs, known_plane(plane), float(timeout_s))


if __name__ == "__main__":
    main()
