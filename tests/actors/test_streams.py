"""Sampled and replayed tickets side by side: which is issued next, and what a batch has of each."""

from actors.flight import Flight
from actors.flights import Flights
from actors.streams import READ_AHEAD, ReplayedFlights, Streams
from distrl.staleness import Admission
from distrl.tasks import Problem
from distrl.tickets import Recorded, Ticket

RECORDED = Recorded(0, 0, "p", 2, 5, "0.arrow", "ab" * 32)


def streams(fresh: int, replayed: int, max_staleness: int = 1) -> Streams:
    sampled = Flights(Admission(max_staleness, fresh), "wait", 1 << 30, 0) if fresh else None
    return Streams(sampled, ReplayedFlights(replayed, 1 << 30, 0, alone=not fresh))


def flight(number: int, *, replayed: bool) -> Flight:
    recorded = RECORDED if replayed else None
    ticket = Ticket(number, 0, "p", "", "replay" if replayed else "policy", 2, (), recorded=recorded)
    return Flight(ticket, Problem("p", "", ""), oldest_step=0, issued_s=0.0)


def issue(both: Streams, steps: int) -> str:
    """Issues all that may be; r and f for each, in order."""
    order = ""
    while (due := both.due(steps)) is not None and due.may_issue():
        replayed = due is both.replayed
        number = sum(part.position for part in (both.fresh, both.replayed) if part is not None)
        both.add(flight(number, replayed=replayed))
        order += "r" if replayed else "f"
    return order


def make_ready(both: Streams, *numbers: int) -> None:
    for number in numbers:
        both.sampled(both.under_way[number], 10)
        both.ready(both.under_way[number], 0.0)


def batch(both: Streams) -> list[int]:
    return [f.ticket.ticket_id for f in both.choose(0)]


def test_tickets_are_issued_in_proportion_whatever_bounds_the_sampled_ones() -> None:
    # Two sampled and one replayed a batch; the window has 2 (1 + 1) = 4 sampled ones.
    assert issue(streams(2, 1), steps=100) == "rffrffr"
    assert issue(streams(1, 3), steps=100) == "rfrrrfrrr"
    # A short run has no more than its batches.
    assert issue(streams(2, 1), steps=1) == "rff"


def test_a_ticket_that_is_dropped_is_made_up_for_in_its_own_stream() -> None:
    both = streams(2, 1)
    issue(both, steps=2)
    assert sorted(both.under_way) == [0, 1, 2, 3, 4, 5]
    both.remove(both.under_way[3])  # replayed
    assert both.due(2) is both.replayed
    both.remove(both.under_way[0])
    both.add(flight(6, replayed=True))
    assert both.due(2) is both.replayed
    both.add(flight(7, replayed=True))
    assert both.due(2) is None
    both.remove(both.under_way[4])  # sampled
    assert both.due(2) is both.fresh


def test_a_batch_has_its_part_of_each_and_waits_for_either() -> None:
    both = streams(2, 1)
    issue(both, steps=2)
    make_ready(both, 1, 2, 4, 5)  # all that is sampled
    assert batch(both) == []
    make_ready(both, 3)  # the second of the recording
    assert batch(both) == []
    make_ready(both, 0)
    assert batch(both) == [0, 1, 2]


def test_a_replayed_straggler_lets_no_sampled_ticket_be_drawn_again() -> None:
    sampled = Flights(Admission(1, 1), "redraw", 1 << 30, 0)
    both = Streams(sampled, ReplayedFlights(1, 1 << 30, 0, alone=False))
    assert issue(both, steps=9) == "rfrfr"
    # 3 alone keeps the next step from being on time, if it is taken at all.
    make_ready(both, 1)
    assert both.overdue(1) == []
    make_ready(both, 0)
    assert [f.ticket.ticket_id for f in both.overdue(1)] == [3]


def test_alone_replayed_tickets_are_read_ahead_and_trained_in_order() -> None:
    both = streams(0, 2)
    assert issue(both, steps=100) == "r" * 2 * READ_AHEAD
    make_ready(both, 1, 2, 3)
    assert batch(both) == []
    make_ready(both, 0)
    assert batch(both) == [0, 1]
    for one in both.choose(0):
        both.grant(one)
    both.trained(1, [0, 1])
    assert (batch(both), issue(both, steps=100)) == ([2, 3], "")
    both.release()
    assert issue(both, steps=100) == "rr"
