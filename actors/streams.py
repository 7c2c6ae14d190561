"""The two streams of tickets of a run, those that are sampled and those that are replayed, and their mixture.

Every batch has a fixed number of each. The staleness contract is that of the sampled stream alone, as if its part were
the whole batch: replayed tickets have no age, wait for nobody and are trained in the order of the recording.
"""

from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any

from actors.flight import Flight
from actors.flights import Flights
from distrl.staleness import Admission

READ_AHEAD = 2
"""Batches of replayed tickets that may be under way where nothing is sampled; else the mixture bounds them."""


class ReplayedFlights(Flights):
    """Tickets that are replayed: trained strictly in their order, so that a run of these alone can be repeated.

    Args:
        alone: whether nothing is sampled beside them.
    """

    def __init__(self, per_step: int, ready_bytes: int, trained_steps: int, *, alone: bool) -> None:
        super().__init__(Admission(0, per_step), "keep", ready_bytes, trained_steps)
        self._alone = alone

    def may_issue(self) -> bool:
        return not self._alone or (self.outstanding < READ_AHEAD * self.size and not self.is_full)

    def choose(self, step: int) -> list[Flight]:
        """The first tickets, once all of them are there."""
        first = [flight for _, flight in sorted(self.under_way.items())[: self.size]]
        return first if len(first) == self.size and all(flight.ready for flight in first) else []


class Streams:
    """Sampled and replayed tickets together.

    Args:
        fresh: tickets that are sampled; None where the run samples nothing.
        replayed: None where it replays nothing.
    """

    def __init__(self, fresh: Flights | None, replayed: ReplayedFlights | None) -> None:
        self.fresh = fresh
        self.replayed = replayed
        # The recording is there at once: with equal claims it goes first.
        self._parts = [part for part in (replayed, fresh) if part is not None]

    def due(self, steps: int) -> Flights | None:
        """The stream of the next ticket in a run of `steps`: the one that is further behind in its part of a batch.

        None where all are issued. A function of what has its place in a batch, so that the mixture is the same after a
        restart.
        """
        wanting = [part for part in self._parts if part.wanted(steps) > 0]
        return min(wanting, key=lambda part: part.position / part.size, default=None)

    @property
    def under_way(self) -> Mapping[int, Flight]:
        """Issued, not yet granted to the learner."""
        return ChainMap(*(part.under_way for part in self._parts))

    @property
    def granted(self) -> Mapping[int, Flight]:
        """In the learner's hands."""
        return ChainMap(*(part.granted for part in self._parts))

    def _of(self, flight: Flight) -> Flights:
        part = self.fresh if flight.ticket.recorded is None else self.replayed
        assert part is not None
        return part

    def add(self, flight: Flight) -> None:
        self._of(flight).add(flight)

    def sampled(self, flight: Flight, size: int) -> None:
        """The responses of a ticket under way are there, `size` bytes of them."""
        self._of(flight).sampled(flight, size)

    def ready(self, flight: Flight, now: float) -> None:
        self._of(flight).ready(flight, now)

    def remove(self, flight: Flight) -> None:
        self._of(flight).remove(flight)

    def grant(self, flight: Flight) -> None:
        self._of(flight).grant(flight)

    def take_back(self, flight: Flight) -> None:
        self._of(flight).take_back(flight)

    def choose(self, step: int) -> list[Flight]:
        """The batch of the step that starts at learner step `step`, in the order of ticket ids; empty: not yet."""
        batches = [part.choose(step) for part in self._parts]
        if not all(batches):
            return []
        return sorted((f for batch in batches for f in batch), key=lambda f: f.ticket.ticket_id)

    def hopeless(self, step: int) -> list[Flight]:
        """See `Flights.hopeless`; what is replayed never is."""
        return [] if self.fresh is None else self.fresh.hopeless(step)

    def overdue(self, step: int) -> list[Flight]:
        """See `Flights.overdue`; none while the step lacks replayed tickets."""
        if self.fresh is None or (self.replayed is not None and not self.replayed.choose(step)):
            return []
        return self.fresh.overdue(step)

    def has(self, ticket_ids: Iterable[int]) -> bool:
        """Whether these tickets are under way or in the learner's hands."""
        return all(any(part.has([i]) for part in self._parts) for i in ticket_ids)

    def trained(self, step: int, ticket_ids: Iterable[int]) -> list[Flight]:
        """See `Flights.trained`; in the order of the ids given."""
        ids = list(ticket_ids)
        trained = [f for part in self._parts for f in part.trained(step, [i for i in ids if part.has([i])])]
        order = {ticket_id: place for place, ticket_id in enumerate(ids)}
        return sorted(trained, key=lambda f: order[f.ticket.ticket_id])

    def roll_back(self, step: int, trained: Iterable[Flight]) -> None:
        """See `Flights.roll_back`."""
        flights = list(trained)
        for part in self._parts:
            part.roll_back(step, [f for f in flights if self._of(f) is part])

    def release(self) -> None:
        for part in self._parts:
            part.release()

    def report(self, now: float) -> dict[str, Any]:
        """See `Flights.report`."""
        reports = [part.report(now) for part in self._parts]
        stages: dict[str, int] = {}
        for report in reports:
            for stage, count in report["stages"].items():
                stages[stage] = stages.get(stage, 0) + count
        waiting = [report["oldest"] for report in reports if report["oldest"] is not None]
        return {
            "stages": stages,
            "granted": sum(report["granted"] for report in reports),
            "oldest": max(waiting, key=lambda oldest: oldest["since_s"], default=None),
        }
