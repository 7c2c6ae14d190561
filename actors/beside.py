"""Samples tickets that are never trained, beside those that are: evaluations, reference responses, opponents."""

from collections.abc import Callable
from dataclasses import dataclass

from actors.flight import Flight
from actors.pipeline import Pipeline
from actors.pool import Member, anybody
from distrl.messages import GenerationReceipt
from distrl.schema import Role
from distrl.seeding import Purpose
from distrl.tasks.problem import Problem
from distrl.tickets import Ticket

PURPOSE = {
    Role.EVALUATION: Purpose.EVALUATION,
    Role.REFERENCE: Purpose.REFERENCE_SAMPLING,
    Role.OPPONENT: Purpose.OPPONENT,
}
"""By role, the noise that its responses are sampled with."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """Responses that were sampled; `flight.generation` refers to their record batch."""

    flight: Flight
    receipt: GenerationReceipt


class Beside:
    """Neither in the ledger's tickets nor counted for staleness: these tickets have numbers of their own.

    Which weights a role samples from is `distrl.tickets.weights_of`; which actors, `Pipeline.pool_of`.

    Args:
        seed: the run's.
        clock: seconds since the epoch.
    """

    def __init__(self, pipeline: Pipeline, seed: int, clock: Callable[[], float]) -> None:
        self._pipeline = pipeline
        self._seed = seed
        self._clock = clock
        self.under_way: dict[tuple[Role, int], Flight] = {}
        """What is being sampled, or was and is not yet `done`."""

    def done(self, sampled: Sampled) -> None:
        """Nothing more is asked of what was sampled."""
        self.under_way.pop((Role(sampled.flight.ticket.role), sampled.flight.ticket.ticket_id), None)

    def oldest(self) -> Flight | None:
        """The ticket that has been where it is for longest."""
        return min(self.under_way.values(), key=lambda f: f.stage_since_s or f.issued_s, default=None)

    async def sample(
        self,
        role: Role,
        index: int,
        problem: Problem,
        responses: int,
        fits: Callable[[Member], bool] = anybody,
    ) -> Sampled:
        """Samples `responses` responses to a problem.

        The noise depends on role and index only: the same weights give the same responses again.

        Args:
            index: number of the ticket within its role, >= 0.
            fits: which members may sample it.
        Raises:
            TicketFailedError: every attempt failed.
        """
        ticket = Ticket(
            ticket_id=index,
            redraw=0,
            prompt_id=problem.prompt_id,
            prompt=problem.prompt,
            role=role,
            group_size=responses,
            stream=(self._seed, int(PURPOSE[role]), index, 0),
            messages=problem.messages,
        )
        flight = Flight(ticket, problem, oldest_step=0, issued_s=self._clock())
        self.under_way[role, index] = flight
        try:
            return Sampled(flight, await self._pipeline.sample(flight, None, fits))
        except BaseException:
            del self.under_way[role, index]
            raise
