"""The ledger: every ticket, policy version, checkpoint and evaluation of a run, in one SQLite file.

Only the coordinator writes; anybody may read it with any SQLite tool while the run goes on (WAL). The state machine
is `distrl.tickets`; this module keeps it on disk, one transaction per transition.
"""

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distrl.errors import LedgerError
from distrl.messages import JournalReceipt
from distrl.staleness import Version
from distrl.tickets import DropReason, TicketState, check_transition

FORMAT = 1
"""Version of the tables; a ledger of a newer format is refused."""

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
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
CREATE TABLE IF NOT EXISTS evaluations (
    evaluation INTEGER PRIMARY KEY, name TEXT NOT NULL, step INTEGER NOT NULL,
    oldest_version INTEGER NOT NULL, newest_version INTEGER NOT NULL,
    problems INTEGER NOT NULL, responses INTEGER NOT NULL, failed INTEGER NOT NULL, accuracy REAL NOT NULL,
    standard_error REAL NOT NULL, reward_mean REAL NOT NULL, finished_s REAL NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class JournalledTicket:
    """A ticket whose rollouts lie in the journal and wait to be trained."""

    ticket_id: int
    redraw: int
    prompt_id: str
    journal_file: str
    journal_sha256: str
    oldest_version: int
    newest_version: int
    reward_mean: float
    response_tokens: int


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a run that goes on finds in its ledger."""

    ready: tuple[JournalledTicket, ...]
    issued: tuple[tuple[int, str], ...]
    """(ticket id, prompt id) of what has to be sampled again, in order."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that the ledger names."""

    path: str
    step: int
    version: int
    sha256: str


class Ledger:
    """A run's accounting. Every method is one transaction; a refused one changes nothing.

    Args:
        path: the SQLite file, on a local disk (WAL does not work over NFS); None keeps it in memory, for tests.
        clock: seconds since the epoch, for the time columns.
    Raises:
        LedgerError: the file was written by a newer format.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._db = sqlite3.connect(path if path is not None else ":memory:", isolation_level=None)
        self._db.row_factory = sqlite3.Row
        if (found := self._format()) > FORMAT:
            self._db.close()
            raise LedgerError(
                f"ledger {path}: format must be at most {FORMAT}, got {found}; use the distrl that wrote it"
            )
        self._db.execute("PRAGMA journal_mode=WAL")
        # NORMAL survives the death of any process; only the loss of the machine can lose the last transactions.
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("PRAGMA foreign_keys=ON")
        self._db.executescript(_TABLES)
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('format', ?)", (str(FORMAT),))

    def close(self) -> None:
        self._db.close()

    # Versions ---------------------------------------------------------------------------------------------------

    def allocate_version(self, parent: int | None, step: int) -> int:
        """A version number that was never used before, for weights after `step` optimizer steps."""
        with self._transaction():
            row = self._one("SELECT COALESCE(MAX(version) + 1, 0) AS next FROM versions")
            version = int(row["next"])
            self._db.execute("INSERT INTO versions (version, parent, step) VALUES (?, ?, ?)", (version, parent, step))
        return version

    def mark_published(self, version: int, manifest_sha256: str) -> None:
        with self._transaction():
            changed = self._db.execute(
                "UPDATE versions SET manifest_sha256 = ?, published_s = ? WHERE version = ?",
                (manifest_sha256, self._clock(), version),
            ).rowcount
            if not changed:
                raise LedgerError(f"version {version} cannot be published: the ledger did not allocate it")

    def versions(self) -> dict[int, Version]:
        rows = self._db.execute("SELECT version, parent, step FROM versions")
        return {r["version"]: Version(r["version"], r["parent"], r["step"]) for r in rows}

    # Tickets ----------------------------------------------------------------------------------------------------

    def issue(self, prompt_id_of: Callable[[int], str]) -> tuple[int, str]:
        """A new ticket: (ticket id, prompt id). The drawn prompt is on disk before anybody samples it."""
        with self._transaction():
            row = self._one("SELECT COALESCE(MAX(ticket_id) + 1, 0) AS next FROM tickets")
            ticket_id = int(row["next"])
            prompt_id = prompt_id_of(ticket_id)
            self._db.execute(
                "INSERT INTO tickets (ticket_id, redraw, prompt_id, state, attempts, issued_s)"
                " VALUES (?, 0, ?, ?, 0, ?)",
                (ticket_id, prompt_id, TicketState.ISSUED, self._clock()),
            )
        return ticket_id, prompt_id

    def count_attempt(self, ticket_id: int) -> None:
        """Records one more failed call for the ticket.

        Raises:
            LedgerError: the ticket was never issued.
        """
        with self._transaction():
            self.state(ticket_id)
            self._db.execute("UPDATE tickets SET attempts = attempts + 1 WHERE ticket_id = ?", (ticket_id,))

    def mark_generated(
        self, ticket_id: int, *, oldest_version: int, newest_version: int, rollouts: int, response_tokens: int
    ) -> None:
        self._move(
            [ticket_id],
            TicketState.GENERATED,
            generated_s=self._clock(),
            oldest_version=oldest_version,
            newest_version=newest_version,
            rollouts=rollouts,
            response_tokens=response_tokens,
        )

    def mark_ready(self, ticket_id: int, *, journal_file: JournalReceipt, reward_mean: float) -> None:
        """Ready means journalled: the file that holds the ticket's rollouts is recorded in the same transaction."""
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO journal_files VALUES (?, ?, ?, ?, ?)",
                (
                    journal_file.path,
                    journal_file.sha256,
                    journal_file.rows,
                    journal_file.bytes,
                    self._clock(),
                ),
            )
            self._set(
                [ticket_id],
                TicketState.READY,
                ready_s=self._clock(),
                journal_file=journal_file.path,
                reward_mean=reward_mean,
            )

    def mark_trained(self, step: int, staleness_by_ticket: Mapping[int, int]) -> None:
        """The optimizer step number `step` (the first is 1) trained these tickets."""
        with self._transaction():
            for ticket_id, value in staleness_by_ticket.items():
                self._set([ticket_id], TicketState.TRAINED, trained_step=step, staleness=value)

    def commit_checkpoint(self, path: str, *, step: int, version: int, sha256: str) -> int:
        """Names a checkpoint and commits, in the same transaction, all tickets trained up to its step.

        Naming the same checkpoint again changes nothing.

        Returns:
            How many tickets were committed.
        """
        with self._transaction():
            known = self._db.execute("SELECT sha256 FROM checkpoints WHERE path = ?", (path,)).fetchone()
            if known is not None and known["sha256"] == sha256:
                return 0
            self._db.execute(
                "INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?, NULL)", (path, step, version, sha256, self._clock())
            )
            tickets = [
                r["ticket_id"]
                for r in self._db.execute(
                    "SELECT ticket_id FROM tickets WHERE state = ? AND trained_step <= ?",
                    (TicketState.TRAINED, step),
                )
            ]
            self._set(tickets, TicketState.COMMITTED, checkpoint=path)
        return len(tickets)

    def drop(self, ticket_id: int, reason: DropReason, detail: str) -> None:
        self._move([ticket_id], TicketState.DROPPED, drop_reason=reason, drop_detail=detail)

    def record_evaluation(self, evaluation: Mapping[str, object]) -> None:
        """Adds a row to `evaluations`; the keys are its columns without the first and the last."""
        columns = {**evaluation, "finished_s": self._clock()}
        names = ", ".join(columns)
        marks = ", ".join("?" * len(columns))
        with self._transaction():
            self._db.execute(f"INSERT INTO evaluations ({names}) VALUES ({marks})", tuple(columns.values()))

    def evaluations(self) -> list[dict[str, object]]:
        return [dict(r) for r in self._db.execute("SELECT * FROM evaluations ORDER BY evaluation")]

    def take_up(self) -> "Recovery":
        """What a coordinator finds that starts on a ledger with a past; the learner may live and hold its weights.

        What was being sampled or graded is issued again. What was trained stays so: see `roll_back`.
        """
        with self._transaction():
            self._back(TicketState.GENERATED, TicketState.ISSUED, "generated_s = NULL, rollouts = NULL")
            issued = self._db.execute(
                "SELECT ticket_id, prompt_id FROM tickets WHERE state = ? ORDER BY ticket_id", (TicketState.ISSUED,)
            ).fetchall()
            return Recovery(self.ready_tickets(), tuple((r["ticket_id"], r["prompt_id"]) for r in issued))

    def roll_back(self, step: int) -> tuple[JournalledTicket, ...]:
        """The learner has the weights of the checkpoint of `step` again: what was trained after it is ready again.

        Returns:
            These tickets; they are in the journal.
        Raises:
            LedgerError: a later checkpoint is committed; there is no way back behind it.
        """
        with self._transaction():
            later = self._one("SELECT MAX(step) AS step FROM checkpoints")["step"]
            if later is not None and later > step:
                raise LedgerError(f"the ledger has a checkpoint of step {later}, it cannot go back to step {step}")
            before = {kept.ticket_id for kept in self.ready_tickets()}
            self._back(TicketState.TRAINED, TicketState.READY, "trained_step = NULL, staleness = NULL")
            return tuple(kept for kept in self.ready_tickets() if kept.ticket_id not in before)

    def ready_tickets(self) -> tuple[JournalledTicket, ...]:
        """Tickets that wait for the learner, or are in its hands, in order."""
        ready = self._db.execute(
            "SELECT * FROM tickets JOIN journal_files ON path = journal_file WHERE state = ? ORDER BY ticket_id",
            (TicketState.READY,),
        )
        return tuple(
            JournalledTicket(
                ticket_id=r["ticket_id"],
                redraw=r["redraw"],
                prompt_id=r["prompt_id"],
                journal_file=r["journal_file"],
                journal_sha256=r["sha256"],
                oldest_version=r["oldest_version"],
                newest_version=r["newest_version"],
                reward_mean=r["reward_mean"],
                response_tokens=r["response_tokens"],
            )
            for r in ready
        )

    def return_ticket(self, ticket_id: int) -> None:
        """Gives up what was sampled for a ticket: it is issued again, as the same prompt."""
        self._move([ticket_id], TicketState.ISSUED, journal_file=None, reward_mean=None)

    def trained_step(self) -> int:
        """The last step of which the ledger knows."""
        return int(self._one("SELECT COALESCE(MAX(trained_step), 0) AS step FROM tickets")["step"])

    def last_published(self) -> int:
        """The version that was published last; 0, the weights that training began with, where none was."""
        return int(self._one("SELECT COALESCE(MAX(version), 0) AS v FROM versions WHERE published_s IS NOT NULL")["v"])

    def unpublished(self, parent: int, step: int) -> int | None:
        """A version for the weights of this step that was allocated and not published, if there is one."""
        row = self._db.execute(
            "SELECT MAX(version) AS v FROM versions"
            " WHERE parent = ? AND step = ? AND published_s IS NULL AND version > ?",
            (parent, step, parent),
        ).fetchone()
        return None if row["v"] is None else int(row["v"])

    def tells(self, step: int, tickets: Iterable[int]) -> bool:
        """Whether exactly these tickets are trained by this step already."""
        rows = self._db.execute("SELECT ticket_id FROM tickets WHERE trained_step = ?", (step,))
        return {r["ticket_id"] for r in rows} == set(tickets)

    def last_checkpoint(self) -> Checkpoint | None:
        """The checkpoint committed last."""
        checkpoints = self.checkpoints()
        return checkpoints[-1] if checkpoints else None

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that are there, the newest last; one that the ledger does not name does not exist."""
        # In the order of commits: the clock may go back between two of them.
        rows = self._db.execute(
            "SELECT path, step, version, sha256 FROM checkpoints WHERE removed_s IS NULL ORDER BY rowid"
        )
        return [Checkpoint(**dict(r)) for r in rows]

    def remove_checkpoints(self, keep: int) -> list[Checkpoint]:
        """Gives up all checkpoints but the newest `keep` and the best, the caller may delete them.

        The best is the latest of those whose step has the highest held-out accuracy. Their rows stay, with the time.
        """
        there = self.checkpoints()
        accuracy = {
            r["step"]: r["accuracy"]
            for r in self._db.execute("SELECT step, accuracy FROM evaluations ORDER BY evaluation")
        }
        measured = [c for c in there if c.step in accuracy]
        best = max(measured, key=lambda c: (accuracy[c.step], c.step), default=None)
        given_up = [c for c in there[:-keep] if c != best]
        with self._transaction():
            for checkpoint in given_up:
                self._db.execute(
                    "UPDATE checkpoints SET removed_s = ? WHERE path = ?", (self._clock(), checkpoint.path)
                )
        return given_up

    def state(self, ticket_id: int) -> TicketState:
        row = self._db.execute("SELECT state FROM tickets WHERE ticket_id = ?", (ticket_id,)).fetchone()
        if row is None:
            raise LedgerError(f"ticket {ticket_id} is not in the ledger")
        return TicketState(row["state"])

    def counts(self) -> dict[str, int]:
        """Tickets by state, every state present; the values sum to the tickets ever issued."""
        rows = self._db.execute("SELECT state, COUNT(*) AS n FROM tickets GROUP BY state")
        found = {r["state"]: int(r["n"]) for r in rows}
        return {state.value: found.get(state.value, 0) for state in TicketState}

    def drops(self) -> dict[str, int]:
        """Dropped tickets by reason."""
        rows = self._db.execute(
            "SELECT drop_reason, COUNT(*) AS n FROM tickets WHERE state = 'dropped' GROUP BY drop_reason"
        )
        return {r["drop_reason"]: int(r["n"]) for r in rows}

    def max_staleness(self) -> int:
        """Largest staleness that was trained; 0 before the first step."""
        return int(self._one("SELECT COALESCE(MAX(staleness), 0) AS s FROM tickets")["s"])

    # ------------------------------------------------------------------------------------------------------------

    def _format(self) -> int:
        """The format that the file has, FORMAT where it is new; read before anything is written."""
        if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            return FORMAT
        row = self._db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
        return FORMAT if row is None else int(row["value"])

    def _back(self, old: TicketState, new: TicketState, columns: str) -> None:
        for row in self._db.execute("SELECT ticket_id FROM tickets WHERE state = ?", (old,)).fetchall():
            check_transition(row["ticket_id"], old, new)
            self._db.execute(f"UPDATE tickets SET state = ?, {columns} WHERE ticket_id = ?", (new, row["ticket_id"]))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _one(self, query: str, *values: object) -> sqlite3.Row:
        row: sqlite3.Row = self._db.execute(query, values).fetchone()
        return row

    def _move(self, tickets: Iterable[int], state: TicketState, **columns: object) -> None:
        with self._transaction():
            self._set(tickets, state, **columns)

    def _set(self, tickets: Iterable[int], state: TicketState, **columns: object) -> None:
        names = "".join(f", {name} = ?" for name in columns)
        for ticket_id in tickets:
            check_transition(ticket_id, self.state(ticket_id), state)
            self._db.execute(
                f"UPDATE tickets SET state = ?{names} WHERE ticket_id = ?",
                (state, *columns.values(), ticket_id),
            )
