"""The journal: finished rollouts as immutable Arrow IPC files, safe on disk before they count as ready."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import ray

from distrl.errors import RunError, StageError
from distrl.journal_file import read_verified, ticket_rows
from distrl.messages import JournalReceipt
from distrl.rollouts import join
from distrl.schema import SCHEMAS, Stage
from distrl.storage import Folder, cause

FLUSH_S = 0.05
"""Rollouts wait at most this long for others to share a file with."""
FLUSH_BYTES = 16 << 20
"""A file is written as soon as this much waits."""


REMEDY = "make room, then go on with distrl resume"
REMOTE_REMEDY = "see that storage.uri can be reached and written to, then go on with distrl resume"


@dataclass(slots=True)
class _Entry:
    rollouts: pa.RecordBatch
    written: "asyncio.Future[JournalReceipt]"


class Journal:
    """Writes one file per flush; a file that has its name is complete, see `distrl.storage.Folder`.

    Args:
        folder: for the files; made if it is missing.
        budget_bytes: what all files together may take; None is no bound.
        clock: seconds since the epoch; part of the file names, so that a restarted journal overwrites nothing.
    """

    def __init__(
        self, folder: Folder | Path, clock: Callable[[], float] = time.time, budget_bytes: int | None = None
    ) -> None:
        self._folder = folder if isinstance(folder, Folder) else Folder(folder)
        self._budget_bytes = budget_bytes
        try:
            self._folder.make()
            self._bytes = sum(self._folder.files().values())
        except OSError as error:
            raise RunError(f"journal {self._folder}: cannot be listed: {cause(error)}; {self._remedy()}") from error
        self._prefix = f"{int(clock() * 1000):013d}"
        self._files = 0
        self._waiting: list[_Entry] = []
        self._timer: asyncio.TimerHandle | None = None
        self._writing = asyncio.Lock()
        self._flushes: set[asyncio.Task[None]] = set()

    @ray.method
    async def append(
        self, generation: pa.RecordBatch, grading: pa.RecordBatch, reference: pa.RecordBatch | None
    ) -> JournalReceipt:
        """Joins a ticket's columns and writes them; returns when the file is safe.

        A ticket that is sent again, because an answer was late or lost, stands once in a file.

        Raises:
            SchemaError: a stage's batch lacks a rollout. RunError: the disk refused.
        """
        loop = asyncio.get_running_loop()
        rollouts = join(generation, grading, reference)
        ids = rollouts.column("rollout_id")
        for other in self._waiting:
            if other.rollouts.column("rollout_id").equals(ids):
                return await asyncio.shield(other.written)
        entry = _Entry(rollouts, loop.create_future())
        self._waiting.append(entry)
        if sum(e.rollouts.nbytes for e in self._waiting) >= FLUSH_BYTES:
            self._flush()
        elif self._timer is None:
            self._timer = loop.call_later(FLUSH_S, self._flush)
        return await asyncio.shield(entry.written)

    @ray.method(num_returns=2)
    async def read(self, path: str, sha256: str, ticket_id: int, redraw: int) -> tuple[int, pa.RecordBatch]:
        """The rows of one draw of a ticket, from a file that is complete and unchanged.

        Returns:
            How many rows, and the joined rows.
        Raises:
            SchemaError: the file is missing, damaged, or of another format. StageError: it does not hold the ticket.
        """
        # By name: the run may have been moved since the ledger named the file.
        name = PurePosixPath(path).name
        rows = await asyncio.to_thread(_read_ticket, self._folder, name, sha256, ticket_id, redraw)
        return rows.num_rows, rows

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiting:
            return
        entries, self._waiting = self._waiting, []
        task = asyncio.get_running_loop().create_task(self._write(entries))
        self._flushes.add(task)
        task.add_done_callback(self._flushes.discard)

    async def _write(self, entries: list[_Entry]) -> None:
        async with self._writing:
            try:
                self._check_budget(sum(e.rollouts.nbytes for e in entries))
            except RunError as error:
                _refuse(entries, error)
                return
            name = f"{self._prefix}-{self._files:06d}.arrow"
            self._files += 1
            try:
                receipt = await asyncio.to_thread(write_file, self._folder, name, [e.rollouts for e in entries])
            except OSError as error:
                # No fault of the tickets: a disk that is full or read-only ends the run, and drops none of them.
                what = f"journal file {self._folder / name}: cannot be written: {cause(error)}"
                _refuse(entries, RunError(f"{what}; {self._remedy()}"))
                return
            except BaseException as error:
                _refuse(entries, error)
                raise
        self._bytes += receipt.bytes
        for entry in entries:
            if not entry.written.done():
                entry.written.set_result(receipt)

    def _remedy(self) -> str:
        return REMEDY if self._folder.local is not None else REMOTE_REMEDY

    def _check_budget(self, more_bytes: int) -> None:
        if self._budget_bytes is not None and self._bytes + more_bytes > self._budget_bytes:
            raise RunError(
                f"limits.journal_bytes: the journal {self._folder} must not grow beyond {self._budget_bytes} bytes, "
                f"it has {self._bytes} and {more_bytes} more to write; run distrl compact, or raise the limit in the "
                "run's config.yaml, then go on with distrl resume"
            )


def _refuse(entries: list[_Entry], error: BaseException) -> None:
    for entry in entries:
        if not entry.written.done():
            entry.written.set_exception(error)


def write_file(folder: Folder, name: str, batches: Sequence[pa.RecordBatch]) -> JournalReceipt:
    """Writes a journal file that is safe, name included, when this returns, and complete or absent.

    Raises:
        OSError: the disk or the storage refused.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMAS[Stage.JOURNAL]) as writer:
        for batch in batches:
            writer.write_batch(batch)
    data = sink.getvalue()
    folder.write(name, data)
    digest = hashlib.sha256(data).hexdigest()
    return JournalReceipt(str(folder / name), digest, sum(b.num_rows for b in batches), data.size)


def _read_ticket(folder: Folder, name: str, sha256: str, ticket_id: int, redraw: int) -> pa.RecordBatch:
    rows = ticket_rows(read_verified(folder, name, sha256), ticket_id, redraw)
    if not rows.num_rows:
        raise StageError(
            f"journal file {folder / name}: must hold draw {redraw} of ticket {ticket_id}, the ledger says so; it does "
            "not"
        )
    return rows
