"""What can be asked of a ledger, by its owner and by anybody else; nothing here writes."""

from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Row
from typing import Any, Self

from distrl.errors import LedgerError
from distrl.ledger_tables import explained, open_to_read
from distrl.staleness import Version
from distrl.tickets import Origin, TicketState

LOCK_S = 30.0
"""Seconds that a statement waits for another process to let go of the file."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that the ledger names."""

    path: str
    step: int
    version: int
    sha256: str


class LedgerReader:
    """Reads a ledger, also while its run goes on; each answer is of one moment.

    Args:
        path: the SQLite file, opened for reading only.
        lock_s: seconds that a query waits while another process holds the file.
    Raises:
        LedgerError: there is no such file, it is no ledger, or of a newer format.
    """

    def __init__(self, path: Path, lock_s: float = LOCK_S) -> None:
        self._path: Path | None = path
        self._lock_s = lock_s
        self._db = open_to_read(path, lock_s)

    def begun(self) -> bool:
        """Whether it has its tables; a file whose maker was killed at once has none, and is a run's all the same."""
        return bool(self.rows("SELECT 1 FROM sqlite_master WHERE name = 'meta'"))

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def rows(self, query: str, *values: object) -> list[Row]:
        """The answer to a query of one's own."""
        with explained(self._path, self._lock_s):
            found: list[Row] = self._db.execute(query, values).fetchall()
        return found

    def _one(self, query: str, *values: object) -> Row:
        (row,) = self.rows(query, *values)
        return row

    def versions(self) -> dict[int, Version]:
        rows = self.rows("SELECT version, parent, step FROM versions ORDER BY version")
        return {r["version"]: Version(r["version"], r["parent"], r["step"]) for r in rows}

    def last_published(self) -> int:
        """The version that was published last; 0, the weights that training began with, where none was."""
        return int(self._one("SELECT COALESCE(MAX(version), 0) AS v FROM versions WHERE published_s IS NOT NULL")["v"])

    def trained_step(self) -> int:
        """The last step of which the ledger knows; 0 before the first."""
        return int(self._one("SELECT COALESCE(MAX(trained_step), 0) AS step FROM tickets")["step"])

    def epoch(self) -> int:
        """How often a process has taken the ledger over; the one that did last is its owner."""
        return int(self._one("SELECT COALESCE(MAX(epoch), 0) AS epoch FROM owners")["epoch"])

    def last_checkpoint(self) -> Checkpoint | None:
        """The checkpoint committed last."""
        checkpoints = self.checkpoints()
        return checkpoints[-1] if checkpoints else None

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that are there, the newest last; one that the ledger does not name does not exist."""
        # In the order of commits: the clock may go back between two of them.
        rows = self.rows("SELECT path, step, version, sha256 FROM checkpoints WHERE removed_s IS NULL ORDER BY rowid")
        return [Checkpoint(**dict(r)) for r in rows]

    def state(self, ticket_id: int) -> TicketState:
        found = self.rows("SELECT state FROM tickets WHERE ticket_id = ?", ticket_id)
        if not found:
            raise LedgerError(f"ticket {ticket_id} is not in the ledger")
        return TicketState(found[0]["state"])

    def counts(self) -> dict[str, int]:
        """Tickets by state, every state present; the values sum to the tickets ever issued."""
        found = {r["state"]: int(r["n"]) for r in self.rows("SELECT state, COUNT(*) AS n FROM tickets GROUP BY state")}
        return {state.value: found.get(state.value, 0) for state in TicketState}

    def drops(self) -> dict[str, int]:
        """Dropped tickets by reason."""
        rows = self.rows("SELECT drop_reason, COUNT(*) AS n FROM tickets WHERE state = 'dropped' GROUP BY drop_reason")
        return {r["drop_reason"]: int(r["n"]) for r in rows}

    def recordings(self) -> dict[str, int]:
        """By the run that recorded it, the tickets of the recording that this run replays."""
        if not self.rows("SELECT 1 FROM sqlite_master WHERE name = 'recordings'"):  # younger than the first ledgers
            return {}
        return {r["run"]: int(r["tickets"]) for r in self.rows("SELECT run, tickets FROM recordings")}

    def replays(self) -> dict[int, Origin]:
        """By ticket, where the rollouts of replayed tickets come from."""
        if not self.rows("SELECT 1 FROM sqlite_master WHERE name = 'replays'"):  # younger than the first ledgers
            return {}
        rows = self.rows("SELECT ticket_id, run, source_ticket, epoch FROM replays ORDER BY ticket_id")
        return {r["ticket_id"]: Origin(r["run"], r["source_ticket"], r["epoch"]) for r in rows}

    def max_staleness(self) -> int:
        """Largest staleness that was trained, replayed tickets apart; 0 before the first step."""
        return int(self._one("SELECT COALESCE(MAX(staleness), 0) AS s FROM tickets")["s"])

    def evaluations(self) -> list[dict[str, Any]]:
        return [dict(r) for r in self.rows("SELECT * FROM evaluations ORDER BY evaluation")]
