"""Reads the files of a run that may be running, failed or empty. Nothing here writes or needs Ray."""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from deploy.run_dir import FORMAT, RunDir, find_run
from deploy.run_storage import run_storage
from distrl.errors import LedgerError, RunError, SchemaError
from distrl.journal_file import read_table
from distrl.ledger import FORMAT as LEDGER_FORMAT
from distrl.staleness import Version

Record = dict[str, Any]

TICKETS = pa.schema(
    [
        pa.field("ticket_id", pa.int64(), nullable=False),
        pa.field("redraw", pa.int32()),
        pa.field("prompt_id", pa.string()),
        pa.field("state", pa.string()),
        pa.field("attempts", pa.int32()),
        pa.field("issued_s", pa.float64()),
        pa.field("generated_s", pa.float64()),
        pa.field("ready_s", pa.float64()),
        pa.field("oldest_version", pa.int64()),
        pa.field("newest_version", pa.int64()),
        pa.field("rollouts", pa.int64()),
        pa.field("response_tokens", pa.int64()),
        pa.field("reward_mean", pa.float64()),
        pa.field("journal_file", pa.string()),
        pa.field("trained_step", pa.int64()),
        pa.field("staleness", pa.int64()),
        pa.field("drop_reason", pa.string()),
        pa.field("drop_detail", pa.string()),
    ]
)
EVALUATIONS = pa.schema(
    [
        pa.field("evaluation", pa.int64(), nullable=False),
        pa.field("name", pa.string()),
        pa.field("step", pa.int64()),
        pa.field("oldest_version", pa.int64()),
        pa.field("newest_version", pa.int64()),
        pa.field("problems", pa.int64()),
        pa.field("responses", pa.int64()),
        pa.field("failed", pa.int64()),
        pa.field("accuracy", pa.float64()),
        pa.field("standard_error", pa.float64()),
        pa.field("reward_mean", pa.float64()),
        pa.field("finished_s", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class LedgerTables:
    """What the ledger held at one moment."""

    tickets: pa.Table
    evaluations: pa.Table
    versions: dict[int, Version]
    published_s: dict[int, float]
    """When each version was published, seconds since the epoch."""
    checkpoints: int


@dataclass(slots=True)
class Missing:
    """What a reader of the report should know is not there; told once each, in the order of finding."""

    notes: list[str] = field(default_factory=list)

    def add(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def open_run(path: Path) -> tuple[RunDir, Record]:
    """The run directory at `path` and its run.json.

    Raises:
        RefusedError: there is none. RunError: a newer distrl wrote it.
    """
    run_dir = find_run(path)
    run = read_json(run_dir.run_json)
    if run.get("format", 0) > FORMAT:
        raise RunError(
            f"RUN: {run_dir.run_json}: format must be at most {FORMAT}, got {run['format']}; "
            "use the distrl that wrote it"
        )
    return run_dir, run


def read_json(path: Path) -> Record:
    """Raises RunError when the file is no JSON object."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"RUN: {path} must be readable JSON: {error}; restore it or name another run") from error
    if not isinstance(values, dict):
        raise RunError(f"RUN: {path} must hold a JSON object, got {type(values).__name__}; restore it")
    return values


def read_config(path: Path, missing: Missing) -> tuple[str, Record]:
    """The config's text and its values.

    They are not validated: a run of another version has other keys, and its report is wanted all the same.
    """
    try:
        text = path.read_text()
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        missing.add("config.yaml cannot be read: the settings are left out.")
        return "", {}
    return text, values if isinstance(values, dict) else {}


def read_records(path: Path, missing: Missing) -> list[Record]:
    """The records of metrics.jsonl, in the order of the file.

    A last line without its end is being written right now and counts as not there yet; another line that is not a
    JSON object is left out and named.
    """
    if not path.is_file():
        missing.add("metrics.jsonl is not there: no step has been recorded.")
        return []
    records = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
        elif line.endswith("\n"):
            missing.add(f"metrics.jsonl, line {number} is not a record and was left out.")
    return records


def read_ledger(path: Path, missing: Missing) -> LedgerTables:
    """All that the report needs of the ledger, in one read transaction; the run may go on writing.

    Raises:
        LedgerError: a newer distrl wrote it, or it is not a ledger.
    """
    if not path.is_file():
        missing.add("ledger.sqlite is not there: nothing is known of tickets and evaluations.")
        return LedgerTables(TICKETS.empty_table(), EVALUATIONS.empty_table(), {}, {}, 0)
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)) as db:
            db.execute("BEGIN")
            _check_format(db, path)
            versions = db.execute("SELECT version, parent, step, published_s FROM versions").fetchall()
            return LedgerTables(
                _table(db, "tickets", TICKETS),
                _table(db, "evaluations", EVALUATIONS),
                {row[0]: Version(*row[:3]) for row in versions},
                {row[0]: row[3] for row in versions if row[3] is not None},
                int(db.execute("SELECT COUNT(*) FROM checkpoints WHERE removed_s IS NULL").fetchone()[0]),
            )
    except sqlite3.Error as error:
        raise LedgerError(f"ledger {path} must be readable: {error}; restore it from a copy") from error


def _check_format(db: sqlite3.Connection, path: Path) -> None:
    row = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
    if row is not None and int(row[0]) > LEDGER_FORMAT:
        raise LedgerError(
            f"ledger {path}: format must be at most {LEDGER_FORMAT}, got {row[0]}; use the distrl that wrote it"
        )


def _table(db: sqlite3.Connection, name: str, schema: pa.Schema) -> pa.Table:
    rows = db.execute(f"SELECT {', '.join(schema.names)} FROM {name} ORDER BY {schema.names[0]}").fetchall()
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.table([pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def read_journal(run_dir: RunDir, files: Iterable[str], columns: Sequence[str], missing: Missing) -> pa.Table | None:
    """Some columns of the named journal files; None when there is no file.

    The ledger names files by the path that they had when they were written; a run directory may have moved since.
    """
    tables = []
    journal = run_storage(run_dir).journal
    for name in dict.fromkeys(Path(file).name for file in files):
        try:
            with journal.open(name) as source:
                tables.append(read_table(source, journal / name).select(columns))
        except SchemaError as error:
            missing.add(f"{error}: its rollouts are left out.")
        except (OSError, KeyError, pa.ArrowInvalid):
            missing.add(f"journal/{name} cannot be read: its rollouts are left out.")
    return pa.concat_tables(tables) if tables else None
