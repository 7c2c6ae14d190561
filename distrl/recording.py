"""The recording of another run: which of its tickets have rollouts in its journal, in which order they are replayed.

The ledger of that run decides: what it has dropped is not replayed, nor what was sampled for a ticket and given up
later, though the journal may still hold it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from sqlite3 import Row

from distrl.ledger_reader import LedgerReader
from distrl.tickets import Origin, Recorded

REPLAYED_STATES = ("ready", "trained", "committed")
"""States of tickets whose rollouts a ledger names. Whether a step has trained them there is of no importance here."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What can be replayed of a run, in the order in which it drew its tickets."""

    run: str
    """Name of the run."""
    tickets: tuple[Recorded, ...]
    left_out: int
    """Tickets without rollouts: dropped, unfinished, or given up by `distrl compact --drop-committed`."""

    def at(self, position: int) -> tuple[Recorded, Origin]:
        """What replay number `position` (the first is 0) is: the tickets in order, again and again."""
        epoch, index = divmod(position, len(self.tickets))
        recorded = self.tickets[index]
        return recorded, Origin(self.run, recorded.ticket_id, epoch)

    def by_ticket(self) -> dict[int, Recorded]:
        return {recorded.ticket_id: recorded for recorded in self.tickets}

    @property
    def sha256(self) -> str:
        """Of the tickets in their order; not of where their rollouts lie, so that the journal may be compacted."""
        digest = hashlib.sha256()
        for t in self.tickets:
            digest.update(f"{t.ticket_id} {t.redraw} {t.prompt_id} {t.rollouts} {t.response_tokens}\n".encode())
        return digest.hexdigest()


def read_recording(ledger: Path) -> Recording:
    """What the ledger of a run says is in its journal; the run is called as its directory is.

    Raises:
        LedgerError: the ledger cannot be read.
    """
    marks = ", ".join("?" * len(REPLAYED_STATES))
    with LedgerReader(ledger) as reader:
        rows = reader.rows(
            "SELECT t.ticket_id, t.redraw, t.prompt_id, t.rollouts, t.response_tokens, f.path, f.sha256 FROM tickets t"
            f" JOIN journal_files f ON f.path = t.journal_file WHERE t.state IN ({marks}) ORDER BY t.ticket_id",
            *REPLAYED_STATES,
        )
        issued = sum(reader.counts().values())
    return Recording(ledger.parent.name, tuple(map(_recorded, rows)), issued - len(rows))


def _recorded(row: Row) -> Recorded:
    return Recorded(
        ticket_id=row["ticket_id"],
        redraw=row["redraw"],
        prompt_id=row["prompt_id"],
        rollouts=row["rollouts"],
        response_tokens=row["response_tokens"],
        file=PurePosixPath(row["path"]).name,
        sha256=row["sha256"],
    )
