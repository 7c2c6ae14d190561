"""Faults that the simulation must find: one small change each in code that keeps the accounts."""

import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from actors.dispatcher import Dispatcher
from actors.flights import Flights
from actors.journal import Journal
from actors.streams import ReplayedFlights, Streams
from distrl.ledger import Ledger
from distrl.staleness import Admission


@dataclass(frozen=True, slots=True)
class Mutation:
    """Another text in the source of one method."""

    name: str
    owner: type
    method: str
    old: str
    new: str
    seed: int
    """Seeds from here on find it soon; `make simulate` searches from 0."""


MUTATIONS = (
    Mutation("numbers of tickets are skipped", Ledger, "_issue", "MAX(ticket_id) + 1", "MAX(ticket_id) + 2", 0),
    Mutation("version numbers are used again", Ledger, "_next_version", "MAX(version) + 1, 0", "MAX(parent) + 1, 0", 0),
    Mutation("a zombie is not fenced", Ledger, "_check_owner", 'newest["epoch"] != self._epoch', "False", 13),
    Mutation("staleness is not recorded", Ledger, "mark_trained", "staleness=value", "staleness=0", 0),
    Mutation(
        "only the newest version of a ticket is recorded",
        Ledger,
        "mark_generated",
        "sorted(set(versions))",
        "[max(versions)]",
        0,
    ),
    Mutation(
        "a checkpoint leaves its own step out", Ledger, "commit_checkpoint", "trained_step <= ?", "trained_step < ?", 0
    ),
    Mutation(
        "a checkpoint is named in a transaction of its own",
        Ledger,
        "commit_checkpoint",
        "tickets = [",
        'self._db.execute("COMMIT"); self._db.execute("BEGIN"); tickets = [',
        0,
    ),
    Mutation(
        "steps since the checkpoint are forgotten after a crash",
        Ledger,
        "roll_back",
        "self._in_states(TicketState.TRAINED)",
        "()",
        7,
    ),
    Mutation(
        "what was being sampled is forgotten after a crash",
        Ledger,
        "take_up",
        "TicketState.ISSUED, TicketState.GENERATED",
        "TicketState.GENERATED",
        7,
    ),
    Mutation(
        "what was being graded is forgotten after a crash",
        Ledger,
        "take_up",
        "TicketState.ISSUED, TicketState.GENERATED",
        "TicketState.ISSUED",
        7,
    ),
    Mutation(
        "a ticket is drawn again under other noise", Ledger, "_return", "int(redraw), ticket_id", "1, ticket_id", 13
    ),
    Mutation(
        "a ticket that is late is drawn again under its old noise",
        Dispatcher,
        "_redraw",
        "redraw=True",
        "redraw=False",
        0,
    ),
    Mutation("a ticket is drawn again without end", Dispatcher, "_redraw", "ticket.redraw < limit", "True", 190),
    Mutation("what was sampled before a redraw still counts", Dispatcher, "_redraw", "flight.abort()", "pass", 60),
    Mutation(
        "rollouts of weights that were left are trained", Dispatcher, "_return_abandoned", "if f.ready", "if False", 250
    ),
    Mutation("a ticket that comes twice is written twice", Journal, "append", "in self._waiting:", "in ():", 60),
    Mutation("a granted ticket may be granted again", Flights, "grant", "self.remove(flight)", "pass", 0),
    Mutation(
        "a drop is not recorded",
        Dispatcher,
        "drop",
        "self._ledger.drop(flight.ticket.ticket_id, reason, detail)",
        "pass",
        5,
    ),
    Mutation("the step does not look ahead", Admission, "choose", "and not late", "", 9),
    Mutation(
        "a recorded ticket is replayed again", Ledger, "issue_replay", "COUNT(*) AS n", "MAX(COUNT(*) - 1, 0) AS n", 0
    ),
    Mutation(
        "what a ticket replays is not written",
        Ledger,
        "issue_replay",
        'self._db.execute("INSERT INTO replays VALUES (?, ?, ?, ?)", (draw.ticket_id, *origin))',
        "pass",
        0,
    ),
    Mutation("recorded tickets are left out", Ledger, "issue_replay", "COUNT(*) AS n", "2 * COUNT(*) AS n", 0),
    Mutation(
        "a replayed ticket is sampled after a crash", Dispatcher, "_put_back", "is not None and", "is None and", 0
    ),
    Mutation("a batch lacks what is replayed", Streams, "choose", "not all(batches)", "not any(batches)", 0),
    Mutation(
        "replayed tickets overtake each other",
        ReplayedFlights,
        "choose",
        "sorted(self.under_way.items())[: self.size]]",
        "sorted(self.under_way.items()) if flight.ready][: self.size]",
        0,
    ),
    Mutation("what is too old after a crash is kept", Flights, "hopeless", "not in trainable", "in ()", 190),
)


@contextmanager
def mutated(mutation: Mutation) -> Iterator[None]:
    """Inside, the method has the mutation's text."""
    original = inspect.getattr_static(mutation.owner, mutation.method)
    source = textwrap.dedent(inspect.getsource(original))
    assert mutation.old in source, f"{mutation.name}: {mutation.method} has no {mutation.old!r} any more"
    namespace: dict[str, Any] = dict(vars(sys.modules[mutation.owner.__module__]))
    exec(source.replace(mutation.old, mutation.new), namespace)
    setattr(mutation.owner, mutation.method, namespace[mutation.method])
    try:
        yield
    finally:
        setattr(mutation.owner, mutation.method, original)
