"""The tables of the ledger, and how its file is opened for writing or for reading only."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distrl.errors import LedgerError

FORMAT = 1
"""Version of the tables; a ledger of a newer format is refused."""

TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owners (epoch INTEGER PRIMARY KEY, owner TEXT NOT NULL, claimed_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS versions (
    version INTEGER PRIMARY KEY, parent INTEGER REFERENCES versions(version), step INTEGER NOT NULL,
    manifest_sha256 TEXT, published_s REAL);
CREATE TABLE IF NOT EXISTS journal_files (
    path TEXT PRIMARY KEY, sha256 TEXT NOT NULL, rows INTEGER NOT NULL, bytes INTEGER NOT NULL,
    created_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS checkpoints (
    path TEXT PRIMARY KEY, step INTEGER NOT NULL, version INTEGER NOT NULL REFERENCES versions(version),
    sha256 TEXT NOT NULL, created_s REAL NOT NULL, removed_s REAL);
CREATE TABLE IF NOT EXISTS tickets (
    ticket_id INTEGER PRIMARY KEY, redraw INTEGER NOT NULL, prompt_id TEXT NOT NULL, state TEXT NOT NULL,
    attempts INTEGER NOT NULL, issued_s REAL NOT NULL, generated_s REAL, ready_s REAL,
    oldest_version INTEGER, newest_version INTEGER, rollouts INTEGER, response_tokens INTEGER,
    reward_mean REAL,
    journal_file TEXT REFERENCES journal_files(path), trained_step INTEGER, staleness INTEGER,
    checkpoint TEXT REFERENCES checkpoints(path), drop_reason TEXT, drop_detail TEXT);
CREATE INDEX IF NOT EXISTS tickets_by_state ON tickets(state, trained_step);
CREATE TABLE IF NOT EXISTS ticket_versions (
    ticket_id INTEGER NOT NULL REFERENCES tickets(ticket_id), version INTEGER NOT NULL REFERENCES versions(version),
    PRIMARY KEY (ticket_id, version)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS trainings (
    ticket_id INTEGER NOT NULL REFERENCES tickets(ticket_id), version INTEGER NOT NULL REFERENCES versions(version),
    redraw INTEGER NOT NULL, PRIMARY KEY (ticket_id, version)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS returns (
    ticket_id INTEGER NOT NULL REFERENCES tickets(ticket_id), redraw INTEGER NOT NULL, old_state TEXT NOT NULL,
    new_state TEXT NOT NULL, cause TEXT NOT NULL, returned_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS failures (
    ticket_id INTEGER NOT NULL REFERENCES tickets(ticket_id), redraw INTEGER NOT NULL, stage TEXT NOT NULL,
    detail TEXT NOT NULL, failed_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS waits (
    ticket_id INTEGER NOT NULL REFERENCES tickets(ticket_id), step INTEGER NOT NULL, waited_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS retired (
    ticket_id INTEGER PRIMARY KEY REFERENCES tickets(ticket_id), retired_s REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS recordings (
    run TEXT PRIMARY KEY, tickets INTEGER NOT NULL, sha256 TEXT NOT NULL, named_s REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replays (
    ticket_id INTEGER PRIMARY KEY REFERENCES tickets(ticket_id), run TEXT NOT NULL REFERENCES recordings(run),
    source_ticket INTEGER NOT NULL, epoch INTEGER NOT NULL, UNIQUE (run, source_ticket, epoch));
CREATE TABLE IF NOT EXISTS put_back (
    checkpoint TEXT NOT NULL, lost_files INTEGER NOT NULL, put_back_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS evaluations (
    evaluation INTEGER PRIMARY KEY, name TEXT NOT NULL, step INTEGER NOT NULL,
    oldest_version INTEGER NOT NULL, newest_version INTEGER NOT NULL,
    problems INTEGER NOT NULL, responses INTEGER NOT NULL, failed INTEGER NOT NULL, accuracy REAL NOT NULL,
    standard_error REAL NOT NULL, reward_mean REAL NOT NULL, finished_s REAL NOT NULL);
"""


def open_to_write(path: Path | None, lock_s: float) -> sqlite3.Connection:
    """Opens or makes a ledger; the tables that it lacks are added.

    Args:
        path: None keeps it in memory.
        lock_s: how long a statement waits while another process holds the file.
    Raises:
        LedgerError: the file is of a newer format, no SQLite file, locked, or cannot be written.
    """
    with explained(path, lock_s):
        db = sqlite3.connect(path if path is not None else ":memory:", timeout=lock_s, isolation_level=None)
    try:
        with explained(path, lock_s):
            _check_format(db, path)
            db.execute("PRAGMA journal_mode=WAL")
            # NORMAL survives the death of any process; only the loss of the machine can lose the last transactions.
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("PRAGMA foreign_keys=ON")
            # All at once: who is killed here leaves an empty file, and who reads finds all tables or none.
            meta = f"INSERT OR IGNORE INTO meta VALUES ('format', '{FORMAT}');"
            db.executescript(f"BEGIN IMMEDIATE; {TABLES} {meta} COMMIT;")
    except BaseException:
        db.close()
        raise
    db.row_factory = sqlite3.Row
    return db


def open_to_read(path: Path, lock_s: float) -> sqlite3.Connection:
    """Opens a ledger such that nothing in it can be changed; its run may go on.

    Raises:
        LedgerError: there is no such file, it is no ledger, or of a newer format.
    """
    if not path.is_file():
        raise LedgerError(f"ledger {path}: must be there, the file does not exist; name the directory of a run")
    # A file that nobody writes to may lie where SQLite cannot make the two files that it shares with a writer.
    wal = path.with_name(path.name + "-wal")
    for option in ("mode=ro", "immutable=1") if not wal.exists() else ("mode=ro",):
        db = sqlite3.connect(f"{path.absolute().as_uri()}?{option}", uri=True, timeout=lock_s, isolation_level=None)
        try:
            with explained(path, lock_s):
                _check_format(db, path)
        except LedgerError as error:
            db.close()
            if option == "mode=ro" and not wal.exists() and "unable to open" in str(error):
                continue
            raise
        db.row_factory = sqlite3.Row
        return db
    raise LedgerError(f"ledger {path}: cannot be opened for reading")


def _check_format(db: sqlite3.Connection, path: Path | None) -> None:
    """Before anything is written: a new file has no format yet."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
        return
    row = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
    if row is not None and int(row[0]) > FORMAT:
        raise LedgerError(f"ledger {path}: format must be at most {FORMAT}, got {row[0]}; use the distrl that wrote it")


_REMEDIES = {
    "SQLITE_BUSY": "another process has held it for {lock_s:g} s; end that process (fuser names it), then go on with "
    "distrl resume",
    "SQLITE_FULL": "make room, then go on with distrl resume",
    "SQLITE_IOERR": "look at the disk, make room if it is full, then go on with distrl resume",
    "SQLITE_READONLY": "make the file and its directory writable, then go on with distrl resume",
    "SQLITE_CANTOPEN": "make the file and its directory readable and writable",
    "SQLITE_CORRUPT": "put back the copy of the ledger that lies with the last checkpoint",
    "SQLITE_NOTADB": "name the directory of a run; if it is one, the file was overwritten",
}


@contextmanager
def explained(path: Path | None, lock_s: float) -> Iterator[None]:
    """Turns what SQLite says of the disk into a LedgerError with a remedy; faults of ours stay what they are."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "")
        remedy = next((text for start, text in _REMEDIES.items() if name.startswith(start)), None)
        if remedy is None:
            raise
        raise LedgerError(f"ledger {path}: {error}; {remedy.format(lock_s=lock_s)}") from error
