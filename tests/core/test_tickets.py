"""The ticket's state machine."""

import itertools
import pickle
from dataclasses import replace

import pytest

from distrl.errors import LedgerError
from distrl.tickets import TRANSITIONS, TicketState, check_transition
from tests.builders import make_ticket, refusal

# The picture of design and documentation, typed by hand: forward, dropped, and back after a crash.
FORWARD = {("issued", "generated"), ("generated", "ready"), ("ready", "trained"), ("trained", "committed")}
DROPS = {("issued", "dropped"), ("generated", "dropped"), ("ready", "dropped")}
RECOVERY = {("generated", "issued"), ("ready", "issued"), ("trained", "ready"), ("trained", "issued")}
ALLOWED = FORWARD | DROPS | RECOVERY


@pytest.mark.parametrize(("old", "new"), list(itertools.product(TicketState, TicketState)))
def test_only_the_arrows_of_the_picture_are_allowed(old: TicketState, new: TicketState) -> None:
    if (old.value, new.value) in ALLOWED:
        check_transition(7, old, new)
    else:
        with pytest.raises(LedgerError):
            check_transition(7, old, new)


def test_a_forbidden_transition_says_where_the_ticket_may_go() -> None:
    assert refusal(LedgerError, lambda: check_transition(7, TicketState.READY, TicketState.GENERATED)) == (
        "ticket 7 cannot go from ready to generated; from ready it may go to dropped, issued, trained"
    )
    assert refusal(LedgerError, lambda: check_transition(8, TicketState.DROPPED, TicketState.READY)) == (
        "ticket 8 cannot go from dropped to ready; from dropped it may go to nothing: it is final"
    )


def test_every_ticket_can_still_end_and_an_end_is_final() -> None:
    ends = {TicketState.COMMITTED, TicketState.DROPPED}
    assert {state for state in TicketState if not TRANSITIONS[state]} == ends
    for state in TicketState:
        reached, frontier = {state}, {state}
        while frontier:
            frontier = {n for s in frontier for n in TRANSITIONS[s]} - reached
            reached |= frontier
        assert reached & ends, state


def test_rollout_ids_differ_between_tickets_redraws_roles_and_indices() -> None:
    ids = set()
    for ticket_id, redraw, role, index in itertools.product((1, 11, 111), (0, 1, 11), ("policy", "evaluation"), (0, 1)):
        ids.add(replace(make_ticket(ticket_id), redraw=redraw, role=role).rollout_id(index))
    assert len(ids) == 3 * 3 * 2 * 2


def test_a_ticket_survives_pickling() -> None:
    ticket = make_ticket(3)
    assert pickle.loads(pickle.dumps(ticket)) == ticket
