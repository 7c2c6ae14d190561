"""All rollouts of a run, to search and filter: an SQLite file that is made from journal and ledger and may be deleted.

The journal is made for writing: to find a response in it, every file must be read. The index reads each file once and
keeps what lists and filters need; states, steps, staleness and drop reasons come from the ledger itself, which goes on
changing.
"""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from deploy.report.files import Missing, read_config
from deploy.report.samples import Decoder, tokenizer_of
from deploy.run_dir import RunDir
from deploy.run_storage import run_storage
from distrl.errors import RunError, SchemaError
from distrl.journal_file import read_table
from distrl.schema import Role

FORMAT = 2

_TABLES = f"""
PRAGMA journal_mode=WAL;
PRAGMA synchronous=OFF;
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS prompts (ticket_id INTEGER PRIMARY KEY, prompt TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rollouts (
    rollout_id TEXT PRIMARY KEY, ticket_id INTEGER NOT NULL, group_index INTEGER NOT NULL, prompt_id TEXT NOT NULL,
    response TEXT NOT NULL, reward REAL NOT NULL, verdict TEXT NOT NULL, reason TEXT, finish_reason TEXT NOT NULL,
    tokens INTEGER NOT NULL, oldest_version INTEGER, newest_version INTEGER, file TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS by_ticket ON rollouts(ticket_id, group_index);
PRAGMA user_version = {FORMAT};
"""
_COLUMNS = (
    *("rollout_id", "ticket_id", "group_index", "prompt_id", "prompt_token_ids", "response_token_ids", "text"),
    *("policy_versions", "finish_reason", "reward", "verdict", "reason", "role"),
)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rollouts are wanted; None takes all."""

    search: str = ""
    """Part of a prompt, response, reason or id; upper and lower case are one."""
    verdict: str | None = None
    reward_min: float | None = None
    reward_max: float | None = None
    staleness: int | None = None
    version: int | None = None
    """A policy version that sampled one of its tokens."""
    step: int | None = None
    """The step that trained it."""
    drop_reason: str | None = None
    """Of a dropped ticket; `any` takes all dropped ones. Without it, tickets that have no rollouts are left out."""

    def where(self) -> tuple[str, list[Any]]:
        """An SQL condition and its values."""
        rules: list[tuple[str, list[Any]]] = []
        if self.search:
            pattern = "%" + self.search.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
            columns = ("p.prompt", "r.response", "r.reason", "r.rollout_id", "t.prompt_id", "t.drop_detail")
            rules.append((" OR ".join(f"{c} LIKE ? ESCAPE '\\'" for c in columns), [pattern] * len(columns)))
        single = (
            ("r.verdict = ?", self.verdict),
            ("r.reward >= ?", self.reward_min),
            ("r.reward <= ?", self.reward_max),
            ("t.staleness = ?", self.staleness),
            ("t.trained_step = ?", self.step),
        )
        rules += [(rule, [value]) for rule, value in single if value is not None]
        if self.version is not None:
            rules.append(("r.oldest_version <= ? AND r.newest_version >= ?", [self.version] * 2))
        if self.drop_reason == "any":
            rules.append(("t.state = 'dropped'", []))
        elif self.drop_reason is not None:
            rules.append(("t.drop_reason = ?", [self.drop_reason]))
        else:
            rules.append(("r.rollout_id IS NOT NULL", []))
        return " AND ".join(f"({rule})" for rule, _ in rules), [v for _, values in rules for v in values]


class RolloutIndex:
    """The rollouts of one run. Not for several threads at once.

    Args:
        file: where to keep the index; None keeps it in memory.
    """

    def __init__(self, run_dir: RunDir, file: Path | None) -> None:
        self._run_dir = run_dir
        self._db = _open(file)
        self._db.row_factory = sqlite3.Row
        self._attached = False
        self._decode: Decoder | None = None

    def close(self) -> None:
        self._db.close()

    def refresh(self) -> int:
        """Reads the journal files that are new; how many rollouts there are."""
        if not self._attach():
            return 0
        known = {row[0] for row in self._db.execute("SELECT path FROM files")}
        written = [r[0] for r in self._db.execute("SELECT path FROM ledger.journal_files ORDER BY rowid")]
        for path in written:
            if path not in known:
                self._add(path)
        self._forget_compacted()
        return int(self._db.execute("SELECT COUNT(*) FROM rollouts").fetchone()[0])

    def find(self, wanted: Filter, *, limit: int = 50, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """Rollouts from the newest ticket on, and how many there are in all.

        A dropped ticket that has no rollouts is one row without response.
        """
        if not self._attach():
            return [], 0
        where, values = wanted.where()
        source = f"""
            FROM ledger.tickets t LEFT JOIN rollouts r ON r.ticket_id = t.ticket_id
            LEFT JOIN prompts p ON p.ticket_id = t.ticket_id WHERE {where}"""
        total = int(self._db.execute(f"SELECT COUNT(*) {source}", values).fetchone()[0])
        rows = self._db.execute(
            f"""SELECT {_SELECTED} {source}
            ORDER BY t.ticket_id DESC, r.group_index LIMIT ? OFFSET ?""",
            [*values, limit, offset],
        )
        return [dict(row) for row in rows], total

    def one(self, rollout_id: str) -> dict[str, Any] | None:
        """A rollout with the journal file that holds its tokens; None where there is none of this id."""
        if not self._attach():
            return None
        row = self._db.execute(
            f"""SELECT {_SELECTED}, r.file FROM rollouts r JOIN ledger.tickets t ON r.ticket_id = t.ticket_id
            LEFT JOIN prompts p ON p.ticket_id = t.ticket_id WHERE r.rollout_id = ?""",
            (rollout_id,),
        ).fetchone()
        return None if row is None else {**dict(row), "origin": self._origin(row["ticket_id"])}

    def _origin(self, ticket_id: int) -> str | None:
        """Which recorded ticket a replayed one is; None for one that was sampled."""
        if not self._db.execute("SELECT 1 FROM ledger.sqlite_master WHERE name = 'replays'").fetchone():
            return None  # younger than the first ledgers
        found = self._db.execute("SELECT * FROM ledger.replays WHERE ticket_id = ?", (ticket_id,)).fetchone()
        return found and f"ticket {found['source_ticket']} of {found['run']}, pass {found['epoch'] + 1}"

    def group(self, ticket_id: int) -> list[dict[str, Any]]:
        """The rollouts of a ticket, which answer the same prompt."""
        rows = self._db.execute(
            "SELECT rollout_id, reward, verdict FROM rollouts WHERE ticket_id = ? ORDER BY group_index", (ticket_id,)
        )
        return [dict(row) for row in rows]

    def drop_reasons(self) -> list[str]:
        if not self._attach():
            return []
        rows = self._db.execute("SELECT DISTINCT drop_reason FROM ledger.tickets WHERE drop_reason IS NOT NULL")
        return sorted(row[0] for row in rows)

    def _attach(self) -> bool:
        """Connects the ledger, to be read only; False while the run has none."""
        if not self._attached and self._run_dir.ledger.is_file():
            self._db.execute("ATTACH ? AS ledger", (f"{self._run_dir.ledger.absolute().as_uri()}?mode=ro",))
            self._attached = True
        return self._attached

    def _forget_compacted(self) -> None:
        """Rollouts whose files `distrl compact` has deleted; those that it kept are in a file that was added."""
        gone = "NOT IN (SELECT path FROM ledger.journal_files)"
        if not self._db.execute(f"SELECT 1 FROM files WHERE path {gone}").fetchone():
            return
        with self._db:
            self._db.execute(f"DELETE FROM rollouts WHERE file {gone}")
            self._db.execute(f"DELETE FROM files WHERE path {gone}")
            self._db.execute("DELETE FROM prompts WHERE ticket_id NOT IN (SELECT ticket_id FROM rollouts)")

    def _add(self, path: str) -> None:
        journal, name = run_storage(self._run_dir).journal, Path(path).name  # the directory may have moved since
        file = journal / name
        try:
            with journal.open(name) as source:
                table = read_table(source, file).select(list(_COLUMNS))
        except SchemaError as error:
            raise RunError(f"RUN: {error}") from error
        except FileNotFoundError:
            return  # compacted or pruned: its rollouts are in another file, or kept no longer
        except (OSError, KeyError, pa.ArrowInvalid) as error:
            raise RunError(f"RUN: {file} must be a journal file: {error}; distrl audit says what is damaged") from error
        decode = self._decode or tokenizer_of(self._run_dir, read_config(self._run_dir.config, Missing())[1])
        self._decode = decode
        rows = [row for row in table.to_pylist() if row["role"] in (Role.POLICY, Role.REPLAY)]
        prompts = {row["ticket_id"]: row["prompt_token_ids"] for row in rows}
        with self._db:
            self._db.executemany(
                "INSERT OR REPLACE INTO rollouts VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)", _values(rows, path)
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO prompts VALUES (?, ?)",
                [(ticket, decode.text(tokens)) for ticket, tokens in prompts.items()],
            )
            self._db.execute("INSERT INTO files VALUES (?)", (path,))


_SELECTED = """
    r.rollout_id, t.ticket_id, t.prompt_id, p.prompt, r.response, r.reward, r.verdict, r.reason, r.finish_reason,
    r.tokens, r.oldest_version, r.newest_version, t.state, t.staleness, t.trained_step, t.drop_reason, t.drop_detail"""


def _values(rows: list[dict[str, Any]], path: str) -> Iterator[tuple[Any, ...]]:
    for row in rows:
        # The versions of a replayed rollout are those of the run that recorded it.
        versions = [None] if row["role"] == Role.REPLAY else row["policy_versions"]
        yield (
            *(
                row[name]
                for name in ("rollout_id", "ticket_id", "group_index", "prompt_id", "text", "reward", "verdict")
            ),
            *(row["reason"], row["finish_reason"], len(row["response_token_ids"]), versions[0], versions[-1], path),
        )


def _open(file: Path | None) -> sqlite3.Connection:
    """An index of another format is made anew."""
    name = "file::memory:" if file is None else file.absolute().as_uri()
    for attempt in range(2):
        db = sqlite3.connect(name, uri=True, check_same_thread=False)
        found = int(db.execute("PRAGMA user_version").fetchone()[0])
        if found in (0, FORMAT) or file is None or attempt:
            break
        db.close()
        for part in (file, *(file.with_name(file.name + end) for end in ("-wal", "-shm"))):
            part.unlink(missing_ok=True)
    db.executescript(_TABLES)
    return db


def open_index(run_dir: RunDir) -> RolloutIndex:
    """The index of a run, in RUN/report where that can be written to, else in memory."""
    folder = run_dir.path / "report"
    try:
        folder.mkdir(exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError:
        return RolloutIndex(run_dir, None)
    return RolloutIndex(run_dir, folder / "rollouts.sqlite")
