"""Makes the journal of a stopped run small: what the ledger names, in few files."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from sqlite3 import Row

import pyarrow as pa

from actors.journal import write_file
from actors.keeper import Keeper
from deploy.run_dir import RunDir, find_run
from deploy.run_state import RunState, claim, read_state, release
from deploy.run_storage import run_storage
from distrl.errors import RefusedError, RunError, SchemaError
from distrl.journal_file import read_verified, ticket_rows
from distrl.ledger import Ledger
from distrl.messages import JournalReceipt
from distrl.storage import Folder, cause

FILE_BYTES = 256 << 20
"""A new file is ended as soon as it has this much."""


@dataclass(frozen=True, slots=True)
class Compacted:
    """What became of a journal."""

    files_before: int
    bytes_before: int
    files_after: int
    bytes_after: int
    retired: int
    """Committed tickets whose rollouts were given up."""


def compact_run(path: Path, *, drop_committed: bool, file_bytes: int = FILE_BYTES) -> Compacted:
    """Compacts a run's journal; copies, then changes the ledger in one transaction, then deletes.

    Raises:
        RefusedError: there is no such run, it is running, or it has no ledger.
        RunError: a file that is needed is damaged, or the disk refused; nothing was changed.
    """
    run_dir = find_run(path)
    if not run_dir.ledger.is_file():
        raise RefusedError(f"{path}: the run must have a ledger to be compacted; it ended before it had begun")
    state = read_state(run_dir)
    lock = claim(run_dir)
    try:
        ledger = Ledger(run_dir.ledger, owner="distrl compact")
        try:
            return _compact(run_dir, ledger, drop_committed, file_bytes)
        finally:
            ledger.close()
    finally:
        release(run_dir, lock, RunState.STOPPED if state == RunState.DIED else state)


def _compact(run_dir: RunDir, ledger: Ledger, drop_committed: bool, file_bytes: int) -> Compacted:
    storage = run_storage(run_dir)
    journal = storage.journal
    before = _reachable(journal)
    tickets = ledger.rows(
        "SELECT t.ticket_id, t.redraw, t.rollouts, t.state, f.path, f.sha256 FROM tickets t"
        " JOIN journal_files f ON f.path = t.journal_file ORDER BY t.ticket_id"
    )
    retired = [t["ticket_id"] for t in tickets if drop_committed and t["state"] == "committed"]
    given_up = set(retired)
    kept = [t for t in tickets if t["ticket_id"] not in given_up]
    new = dict(_copies(journal, kept, f"compact-{ledger.owned_epoch:06d}", file_bytes))
    try:
        ledger.compact_journal(new, retired)
    except BaseException:
        for receipt in new:
            journal.delete(PurePosixPath(receipt.path).name)
        raise
    # The copies of the ledger name the old files: a run that is put back from one must find the new ones.
    if (last := ledger.last_checkpoint()) is not None:
        Keeper(run_dir.ledger, storage.checkpoints, storage.ledgers).copy_ledger(last.path)
    named = {PurePosixPath(r.path).name for r in new}
    for name in before:
        if name not in named:
            journal.delete(name)
    bytes_after = sum(r.bytes for r in new)
    return Compacted(len(before), sum(before.values()), len(new), bytes_after, len(retired))


def _reachable(journal: Folder) -> dict[str, int]:
    try:
        return journal.files()
    except OSError as error:
        raise RunError(f"journal {journal}: cannot be listed: {cause(error)}; nothing was changed") from error


def _copies(
    journal: Folder, tickets: list[Row], prefix: str, file_bytes: int
) -> Iterator[tuple[JournalReceipt, list[int]]]:
    """New files with the tickets' rollouts, in the order of the old files, each with its tickets."""
    by_file: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for ticket in tickets:
        by_file[ticket["path"], ticket["sha256"]].append(ticket)
    batches: list[pa.RecordBatch] = []
    ids: list[int] = []
    count = 0
    for (name, sha256), wanted in by_file.items():
        table = _read(journal, PurePosixPath(name).name, sha256)
        for ticket in wanted:
            batches.append(_rows(table, ticket, name))
            ids.append(ticket["ticket_id"])
        if sum(b.nbytes for b in batches) >= file_bytes:
            yield _write(journal, f"{prefix}-{count:06d}.arrow", batches), ids
            batches, ids, count = [], [], count + 1
    if batches:
        yield _write(journal, f"{prefix}-{count:06d}.arrow", batches), ids


def _read(journal: Folder, name: str, sha256: str) -> pa.Table:
    try:
        return read_verified(journal, name, sha256)
    except SchemaError as error:
        raise RunError(str(error)) from error


def _rows(table: pa.Table, ticket: Row, name: str) -> pa.RecordBatch:
    rows = ticket_rows(table, ticket["ticket_id"], ticket["redraw"])
    if rows.num_rows != ticket["rollouts"]:
        raise RunError(
            f"journal file {name}: must hold {ticket['rollouts']} rollouts of ticket {ticket['ticket_id']}, got "
            f"{rows.num_rows}; look at distrl audit"
        )
    return rows


def _write(journal: Folder, name: str, batches: list[pa.RecordBatch]) -> JournalReceipt:
    try:
        return write_file(journal, name, batches)
    except OSError as error:
        path = journal / name
        raise RunError(f"journal file {path}: cannot be written: {cause(error)}; make room and call again") from error
