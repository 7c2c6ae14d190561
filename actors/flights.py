"""The tickets between issue and training: which there are, which a step may take, whether more may be issued."""

from collections.abc import Iterable, Sequence
from typing import Any

from actors.flight import Flight
from distrl.staleness import Admission, Outstanding


class Flights:
    """Bookkeeping of the coordinator; decides nothing that `Admission` does not.

    Args:
        on_stale: `wait`, `redraw` or `keep`, see `distrl.config_sections.TrainConfig`.
        ready_bytes: size of the sampled rollouts beyond which no ticket is issued.
        trained_steps: optimizer steps that an earlier process has trained.
    """

    def __init__(self, admission: Admission, on_stale: str, ready_bytes: int, trained_steps: int) -> None:
        self._admission = admission
        self._on_stale = on_stale
        self._ready_bytes = ready_bytes
        self._trained_steps = trained_steps
        self._unreleased = 0  # trained, but their step's weights are not published yet
        self.under_way: dict[int, Flight] = {}
        """Issued, not yet granted to the learner."""
        self.granted: dict[int, Flight] = {}
        """In the learner's hands."""
        # Kept as sums over `under_way`: they are asked for with every ticket, and there may be thousands under way.
        self._ready = 0
        self._sampled = 0
        self._sampled_bytes = 0

    @property
    def size(self) -> int:
        """Tickets that every step's batch has of these."""
        return self._admission.tickets_per_step

    @property
    def position(self) -> int:
        """Tickets that have their place in a batch, from the first step on; a drop or a return gives one back."""
        return self._trained_steps * self.size + len(self.under_way) + len(self.granted)

    @property
    def outstanding(self) -> int:
        """Tickets that fill the window."""
        return len(self.under_way) + len(self.granted) + self._unreleased

    def wanted(self, steps: int) -> int:
        """Tickets still to be issued for a run of `steps`."""
        return steps * self.size - self.position

    def may_issue(self) -> bool:
        return self._admission.may_issue(self.outstanding, self._ready) and not self.is_full

    @property
    def is_full(self) -> bool:
        """Whether a whole batch waits and takes all the room that there is."""
        return self._sampled >= self.size and self._sampled_bytes >= self._ready_bytes

    def add(self, flight: Flight) -> None:
        """Takes up a ticket that nothing was sampled for yet."""
        self.under_way[flight.ticket.ticket_id] = flight

    def sampled(self, flight: Flight, size: int) -> None:
        """The responses of a ticket under way are there, `size` bytes of them."""
        flight.bytes = size
        self._sampled += 1
        self._sampled_bytes += size

    def ready(self, flight: Flight, now: float) -> None:
        """A ticket under way waits for the learner from now on."""
        flight.enter("ready", now)
        self._ready += 1

    def remove(self, flight: Flight) -> None:
        """Forgets a ticket under way; one that is not is left alone."""
        if self.under_way.pop(flight.ticket.ticket_id, None) is None:
            return
        self._ready -= flight.ready
        if flight.bytes:
            self._sampled -= 1
            self._sampled_bytes -= flight.bytes

    def choose(self, step: int) -> list[Flight]:
        """The batch of the step that starts at learner step `step`, in the order of ticket ids; empty: not yet."""
        size = self.size
        if self._on_stale == "keep":
            ready = sorted(f.ticket.ticket_id for f in self.under_way.values() if f.ready)
            batch: Sequence[int] = ready[:size] if len(ready) >= size else []
        else:
            outstanding = [Outstanding(f.ticket.ticket_id, f.oldest_step, f.ready) for f in self.under_way.values()]
            batch = self._admission.choose(outstanding, step).batch
        return [self.under_way[i] for i in batch]

    def has(self, ticket_ids: Iterable[int]) -> bool:
        """Whether these tickets are under way or in the learner's hands."""
        return all(i in self.granted or i in self.under_way for i in ticket_ids)

    def hopeless(self, step: int) -> list[Flight]:
        """Ready tickets that can no longer be trained within the bound; see `Admission.trainable`."""
        if self._on_stale == "keep":
            return []
        outstanding = [Outstanding(f.ticket.ticket_id, f.oldest_step, f.ready) for f in self.under_way.values()]
        trainable = self._admission.trainable(outstanding, step)
        return [f for i, f in sorted(self.under_way.items()) if f.ready and i not in trainable]

    def overdue(self, step: int) -> list[Flight]:
        """Tickets that are not ready and that alone keep the step from its batch; see `Admission.overdue`."""
        if self._on_stale != "redraw":
            return []
        outstanding = [Outstanding(f.ticket.ticket_id, f.oldest_step, f.ready) for f in self.under_way.values()]
        return [self.under_way[i] for i in self._admission.overdue(outstanding, step)]

    def grant(self, flight: Flight) -> None:
        self.remove(flight)
        self.granted[flight.ticket.ticket_id] = flight

    def trained(self, step: int, ticket_ids: Iterable[int]) -> list[Flight]:
        """The learner has trained these tickets in step number `step`; they fill the window until `release`."""
        flights = [self._handed_over(i) for i in ticket_ids]
        self._unreleased += len(flights)
        self._trained_steps = step
        return flights

    def _handed_over(self, ticket_id: int) -> Flight:
        if ticket_id in self.granted:
            return self.granted.pop(ticket_id)
        # An earlier process of the coordinator granted it.
        flight = self.under_way[ticket_id]
        self.remove(flight)
        return flight

    def roll_back(self, step: int, trained: Iterable[Flight]) -> None:
        """The learner stands at `step` again: what it had in hand, and what it trained since, waits for it."""
        for flight in list(self.granted.values()):
            self.take_back(flight)
        self.granted.clear()
        for flight in trained:
            self.take_back(flight)
        self._trained_steps = step
        self._unreleased = 0

    def take_back(self, flight: Flight) -> None:
        """A ticket with all its columns waits for the learner."""
        self.add(flight)
        self.sampled(flight, flight.bytes)
        flight.stage = "ready"
        self._ready += 1

    def release(self) -> None:
        """The weights of the trained tickets' step are published."""
        self._unreleased = 0

    def report(self, now: float) -> dict[str, Any]:
        """Tickets by stage, and the one that has been where it is for longest."""
        stages: dict[str, int] = {}
        for flight in self.under_way.values():
            stages[flight.stage] = stages.get(flight.stage, 0) + 1
        waiting = [f for f in self.under_way.values() if not f.ready]
        oldest = min(waiting, key=lambda f: f.stage_since_s, default=None)
        return {
            "stages": stages,
            "granted": len(self.granted),
            "oldest": oldest
            and {
                "ticket": oldest.ticket.ticket_id,
                "stage": oldest.stage,
                "since_s": now - oldest.stage_since_s,
                "calls": calls_of(oldest, now),
            },
        }


def calls_of(flight: Flight, now: float) -> list[dict[str, Any]]:
    """What a ticket waits for: stages, each with the process that has it (empty: none yet) and the seconds since."""
    return [
        {"stage": stage, "process": process, "since_s": now - since}
        for stage, (process, since) in sorted(flight.calls.items())
    ]
