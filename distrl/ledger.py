"""The ledger: every ticket, policy version, checkpoint and evaluation of a run, in one SQLite file.

Only the coordinator writes; anybody may read it with any SQLite tool while the run goes on (WAL). The state machine
is `distrl.tickets`; this module keeps it on disk, one transaction per transition. An epoch fences whoever was taken
over: a coordinator that was believed dead, or a second driver.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from distrl.errors import FencedError, LedgerError
from distrl.ledger_reader import LOCK_S, Checkpoint, LedgerReader
from distrl.ledger_records import Draw, JournalledTicket, Recovery
from distrl.ledger_tables import FORMAT, explained, open_to_write
from distrl.messages import JournalReceipt
from distrl.tickets import DropReason, Origin, ReturnCause, TicketState, check_transition

__all__ = ["FORMAT", "Checkpoint", "Draw", "JournalledTicket", "Ledger", "LedgerReader", "Recovery"]


class Ledger(LedgerReader):
    """A run's accounting. Every method is one transaction; a refused one changes nothing.

    Opening a ledger takes it over: the epoch grows by one, and whoever opened it before cannot write any more.

    Args:
        path: the SQLite file, on a local disk (WAL does not work over NFS); None keeps it in memory, for tests.
        clock: seconds since the epoch, for the time columns.
        owner: who opens it, for the table of owners and for messages.
        lock_s: seconds that a statement waits while another process holds the file.
    Raises:
        LedgerError: the file is of a newer format, no ledger, locked, or cannot be written.
    """

    def __init__(
        self,
        path: Path | None,
        clock: Callable[[], float] = time.time,
        owner: str | None = None,
        lock_s: float = LOCK_S,
    ) -> None:
        self._path = path
        self._clock = clock
        self._lock_s = lock_s
        self._db = open_to_write(path, lock_s)
        try:
            self._epoch = self._take_over(owner or f"process {os.getpid()} on {socket.gethostname()}")
        except BaseException:
            self._db.close()
            raise

    def _take_over(self, owner: str) -> int:
        with explained(self._path, self._lock_s):
            self._db.execute("BEGIN IMMEDIATE")
            epoch = self.epoch() + 1
            self._db.execute("INSERT INTO owners VALUES (?, ?, ?)", (epoch, owner, self._clock()))
            self._db.execute("COMMIT")
        return epoch

    @property
    def owned_epoch(self) -> int:
        """The epoch under which this object writes."""
        return self._epoch

    # Versions ---------------------------------------------------------------------------------------------------

    def allocate_version(self, parent: int | None, step: int) -> int:
        """A version number that was never used before, for weights after `step` optimizer steps."""
        with self._transaction():
            return self._next_version(parent, step)

    def _next_version(self, parent: int | None, step: int) -> int:
        version = int(self._one("SELECT COALESCE(MAX(version) + 1, 0) AS next FROM versions")["next"])
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

    # Tickets ----------------------------------------------------------------------------------------------------

    def issue(self, prompt_id_of: Callable[[int], str]) -> Draw:
        """A new ticket. The drawn prompt is on disk before anybody samples it."""
        with self._transaction():
            return self._issue(prompt_id_of)

    def _issue(self, prompt_id_of: Callable[[int], str]) -> Draw:
        row = self._one("SELECT COALESCE(MAX(ticket_id) + 1, 0) AS next FROM tickets")
        ticket_id = int(row["next"])
        prompt_id = prompt_id_of(ticket_id)
        self._db.execute(
            "INSERT INTO tickets (ticket_id, redraw, prompt_id, state, attempts, issued_s) VALUES (?, 0, ?, ?, 0, ?)",
            (ticket_id, prompt_id, TicketState.ISSUED, self._clock()),
        )
        return Draw(ticket_id, prompt_id, 0)

    def name_recording(self, run: str, tickets: int, sha256: str) -> None:
        """The run replays this recording and no other, from its first ticket to its last.

        Raises:
            LedgerError: it has begun with another recording, or with fewer or more tickets of this one.
        """
        with self._transaction():
            named = self.rows("SELECT run, tickets, sha256 FROM recordings")
            if not named:
                self._db.execute("INSERT INTO recordings VALUES (?, ?, ?, ?)", (run, tickets, sha256, self._clock()))
            elif (named[0]["run"], named[0]["sha256"]) != (run, sha256):
                raise LedgerError(
                    f"replay.journal must be the recording that this run began with, {named[0]['tickets']} tickets of "
                    f"the run {named[0]['run']} (sha256 {named[0]['sha256'][:12]}), got {tickets} tickets of {run} "
                    f"(sha256 {sha256[:12]}); put the recorded run back as it was, or start a new run"
                )

    def issue_replay(self, at: Callable[[int], tuple[str, Origin]]) -> tuple[Draw, Origin]:
        """A new ticket that replays the next one of the recording, and where that is from.

        Args:
            at: number of the replay (the first is 0) to the prompt's id and where its rollouts come from.
        """
        with self._transaction():
            prompt_id, origin = at(int(self._one("SELECT COUNT(*) AS n FROM replays")["n"]))
            draw = self._issue(lambda _: prompt_id)
            self._db.execute("INSERT INTO replays VALUES (?, ?, ?, ?)", (draw.ticket_id, *origin))
        return draw, origin

    def count_attempt(self, ticket_id: int, stage: str, detail: str) -> None:
        """Records a failed call for the ticket.

        Raises:
            LedgerError: the ticket was never issued.
        """
        with self._transaction():
            self.state(ticket_id)
            self._db.execute("UPDATE tickets SET attempts = attempts + 1 WHERE ticket_id = ?", (ticket_id,))
            self._db.execute(
                "INSERT INTO failures SELECT ticket_id, redraw, ?, ?, ? FROM tickets WHERE ticket_id = ?",
                (stage, detail, self._clock(), ticket_id),
            )

    def record_wait(self, ticket_id: int, step: int, waited_s: float) -> None:
        """The learner waited so long for this ticket, the last one of its step's batch."""
        with self._transaction():
            self._db.execute("INSERT INTO waits VALUES (?, ?, ?)", (ticket_id, step, waited_s))

    def mark_generated(self, ticket_id: int, *, versions: Sequence[int], rollouts: int, response_tokens: int) -> None:
        """The ticket was sampled.

        Args:
            versions: all policy versions that sampled one of its tokens; empty where another run did.
        """
        with self._transaction():
            self._set(
                [ticket_id],
                TicketState.GENERATED,
                generated_s=self._clock(),
                oldest_version=min(versions, default=None),
                newest_version=max(versions, default=None),
                rollouts=rollouts,
                response_tokens=response_tokens,
            )
            self._db.executemany(
                "INSERT INTO ticket_versions VALUES (?, ?)", [(ticket_id, v) for v in sorted(set(versions))]
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

    def mark_trained(self, step: int, staleness_by_ticket: Mapping[int, int | None], parent: int) -> int:
        """The optimizer step number `step` (the first is 1) trained these tickets; the version of the weights it made.

        Telling it again changes nothing and gives the same version.

        Args:
            staleness_by_ticket: None where no weights of this run sampled the ticket.
            parent: version of the weights that the step began with.
        """
        with self._transaction():
            told = self._version_made_by(step, frozenset(staleness_by_ticket))
            if told is not None:
                return told
            version = self._next_version(parent, step)
            for ticket_id, value in staleness_by_ticket.items():
                self._set([ticket_id], TicketState.TRAINED, trained_step=step, staleness=value)
                self._db.execute(
                    "INSERT INTO trainings SELECT ticket_id, ?, redraw FROM tickets WHERE ticket_id = ?",
                    (version, ticket_id),
                )
        return version

    def _version_made_by(self, step: int, tickets: frozenset[int]) -> int | None:
        """The version that this very step has made, if it stands in the ledger already."""
        rows = self.rows(
            "SELECT t.ticket_id, MAX(m.version) AS version FROM tickets t JOIN trainings m USING (ticket_id)"
            " WHERE t.state = ? AND t.trained_step = ? GROUP BY t.ticket_id",
            TicketState.TRAINED,
            step,
        )
        if not tickets or {r["ticket_id"] for r in rows} != tickets:
            return None
        return max(int(r["version"]) for r in rows)

    def commit_checkpoint(self, path: str, *, step: int, version: int, sha256: str) -> int:
        """Names a checkpoint and commits, in the same transaction, all tickets trained up to its step.

        Naming the same checkpoint again changes nothing.

        Returns:
            How many tickets were committed.
        """
        with self._transaction():
            if self.rows("SELECT 1 FROM checkpoints WHERE path = ? AND sha256 = ?", path, sha256):
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

    def return_ticket(self, ticket_id: int, cause: ReturnCause, *, redraw: bool) -> Draw:
        """Gives up what was sampled for a ticket: it is issued again, as the same prompt.

        Args:
            redraw: whether it meets new noise; without, the same weights give the same responses.
        Raises:
            LedgerError: the ticket is trained, committed or dropped, or was never issued.
        """
        with self._transaction():
            return self._return(ticket_id, cause, redraw=redraw)

    def _return(self, ticket_id: int, cause: ReturnCause, *, redraw: bool = False) -> Draw:
        old = self.state(ticket_id)
        if old != TicketState.ISSUED:
            check_transition(ticket_id, old, TicketState.ISSUED)
        self._note_return(ticket_id, TicketState.ISSUED, cause)
        self._db.execute("DELETE FROM ticket_versions WHERE ticket_id = ?", (ticket_id,))
        self._db.execute(
            "UPDATE tickets SET state = ?, redraw = redraw + ?, generated_s = NULL, ready_s = NULL,"
            " oldest_version = NULL, newest_version = NULL, rollouts = NULL, response_tokens = NULL,"
            " reward_mean = NULL, journal_file = NULL, trained_step = NULL, staleness = NULL WHERE ticket_id = ?",
            (TicketState.ISSUED, int(redraw), ticket_id),
        )
        row = self._one("SELECT ticket_id, prompt_id, redraw FROM tickets WHERE ticket_id = ?", ticket_id)
        return Draw(row["ticket_id"], row["prompt_id"], row["redraw"])

    def _note_return(self, ticket_id: int, new: TicketState, cause: ReturnCause) -> None:
        self._db.execute(
            "INSERT INTO returns SELECT ticket_id, redraw, state, ?, ?, ? FROM tickets WHERE ticket_id = ?",
            (new, cause, self._clock(), ticket_id),
        )

    def take_up(self) -> Recovery:
        """What a coordinator finds that starts on a ledger with a past; the learner may live and hold its weights.

        What was being sampled or graded is issued again. What was trained stays so: see `roll_back`.
        """
        with self._transaction():
            issued = [
                self._return(ticket_id, ReturnCause.RESTART)
                for ticket_id in self._in_states(TicketState.ISSUED, TicketState.GENERATED)
            ]
            return Recovery(self.journalled(self._in_states(TicketState.READY)), tuple(issued))

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
            trained = self._in_states(TicketState.TRAINED)
            for ticket_id in trained:
                check_transition(ticket_id, TicketState.TRAINED, TicketState.READY)
                self._note_return(ticket_id, TicketState.READY, ReturnCause.ROLLBACK)
                self._db.execute(
                    "UPDATE tickets SET state = ?, trained_step = NULL, staleness = NULL WHERE ticket_id = ?",
                    (TicketState.READY, ticket_id),
                )
            return self.journalled(trained)

    def journalled(self, ticket_ids: Iterable[int]) -> tuple[JournalledTicket, ...]:
        """Where the rollouts of ready tickets are."""
        return tuple(self._journalled_ticket(ticket_id) for ticket_id in sorted(ticket_ids))

    def _in_states(self, *states: TicketState) -> list[int]:
        marks = ", ".join("?" * len(states))
        rows = self.rows(f"SELECT ticket_id FROM tickets WHERE state IN ({marks}) ORDER BY ticket_id", *states)
        return [r["ticket_id"] for r in rows]

    def _journalled_ticket(self, ticket_id: int) -> JournalledTicket:
        row = self._one(
            "SELECT * FROM tickets JOIN journal_files ON path = journal_file WHERE ticket_id = ?", ticket_id
        )
        versions = self.rows("SELECT version FROM ticket_versions WHERE ticket_id = ?", ticket_id)
        return JournalledTicket(
            ticket_id=row["ticket_id"],
            redraw=row["redraw"],
            prompt_id=row["prompt_id"],
            journal_file=row["journal_file"],
            journal_sha256=row["sha256"],
            oldest_version=row["oldest_version"],
            newest_version=row["newest_version"],
            versions=tuple(r["version"] for r in versions),
            rollouts=row["rollouts"],
            reward_mean=row["reward_mean"],
            response_tokens=row["response_tokens"],
        )

    def compact_journal(self, files: Mapping[JournalReceipt, Sequence[int]], retired: Sequence[int]) -> list[str]:
        """Moves rollouts to other journal files; those that no ticket is in any more are forgotten.

        Args:
            files: new files, safe on disk, with the tickets that are now in them.
            retired: committed tickets whose rollouts are given up.
        Returns:
            The paths of the files that were forgotten; the caller may delete them.
        Raises:
            LedgerError: a retired ticket is not committed: its rollouts are still needed.
        """
        with self._transaction():
            for ticket_id in retired:
                if (state := self.state(ticket_id)) != TicketState.COMMITTED:
                    raise LedgerError(f"ticket {ticket_id} must be committed to give up its rollouts, it is {state}")
                self._db.execute("INSERT INTO retired VALUES (?, ?)", (ticket_id, self._clock()))
                self._db.execute("UPDATE tickets SET journal_file = NULL WHERE ticket_id = ?", (ticket_id,))
            for file, tickets in files.items():
                self._db.execute(
                    "INSERT INTO journal_files VALUES (?, ?, ?, ?, ?)",
                    (file.path, file.sha256, file.rows, file.bytes, self._clock()),
                )
                self._db.executemany(
                    "UPDATE tickets SET journal_file = ? WHERE ticket_id = ?", [(file.path, i) for i in tickets]
                )
            unused = "path NOT IN (SELECT journal_file FROM tickets WHERE journal_file IS NOT NULL)"
            forgotten = [r["path"] for r in self.rows(f"SELECT path FROM journal_files WHERE {unused} ORDER BY path")]
            self._db.execute(f"DELETE FROM journal_files WHERE {unused}")
        return forgotten

    def note_put_back(self, checkpoint: str, lost_files: int) -> None:
        """This file is the copy that lay with a checkpoint; `lost_files` journal files are younger than it."""
        with self._transaction():
            self._db.execute("INSERT INTO put_back VALUES (?, ?, ?)", (checkpoint, lost_files, self._clock()))

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

    # ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, and nothing at all once another process has taken the ledger over."""
        with explained(self._path, self._lock_s):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._check_owner()
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has rolled it back already
                    self._db.execute("ROLLBACK")
                raise

    def _check_owner(self) -> None:
        newest = self._one("SELECT epoch, owner FROM owners ORDER BY epoch DESC LIMIT 1")
        if newest["epoch"] != self._epoch:
            raise FencedError(
                f"ledger {self._path}: only its owner may write, which is {newest['owner']} with epoch "
                f"{newest['epoch']}; this process has epoch {self._epoch} and must end"
            )

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
