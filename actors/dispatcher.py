"""Issues tickets and sees each through its stages, until it waits for the learner or is dropped."""

from collections import deque
from collections.abc import Callable

from actors.beside import Beside
from actors.calls import DataLostError
from actors.flight import Flight
from actors.flights import Flights
from actors.outcome import Outcome
from actors.pipeline import Grades, Pipeline, TicketFailedError
from actors.policy_versions import PolicyVersions
from actors.pool import Member
from actors.recorder import Recorder
from actors.replays import Replays
from actors.settings import CoordinatorSettings, Prompts
from actors.streams import ReplayedFlights, Streams
from actors.waits import Stopwatch
from distrl.errors import DistrlError, RunError
from distrl.ledger import Draw, JournalledTicket, Ledger
from distrl.messages import GenerationReceipt
from distrl.schema import Role
from distrl.seeding import Purpose
from distrl.tasks.problem import Problem
from distrl.tickets import DropReason, Recorded, ReturnCause, Ticket, weights_of


class Dispatcher:
    """The part of the coordinator between a draw and the ready buffer.

    Attributes:
        issuing: whether new tickets may be issued at all; how many, the staleness contract says.
        flights: the tickets under way and in the learner's hands.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        ledger: Ledger,
        prompts: Prompts,
        pipeline: Pipeline,
        versions: PolicyVersions,
        recorder: Recorder,
        outcome: Outcome,
        clock: Callable[[], float],
        replays: Replays | None = None,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._prompts = prompts
        self._pipeline = pipeline
        self._versions = versions
        self._recorder = recorder
        self._outcome = outcome
        self._clock = clock
        self.issuing = False
        self.first_opponent = 0
        """Oldest version that opponents are sampled from: after a restart engines start from weights that are none, and
        who meets whom in a synchronous run must not depend on who loads first."""
        self._beside = Beside(pipeline, settings.seed, clock)
        self.flights = _streams(settings, ledger.trained_step())
        self._replays = replays
        self.held = Stopwatch(clock)
        """While generation is idle because only the learner's progress allows to issue more."""
        self._again: deque[Draw] = deque()  # issued before, and to be sampled again
        self._drops_in_a_row = 0
        pipeline.generation.on_change(self.issue)
        pipeline.on_failure = self._count_failure

    async def take_up(self) -> tuple[int, int]:
        """Takes up the tickets of an earlier process: how many were ready, and how many are sampled again.

        Raises:
            DistrlError: the journal does not have what the ledger says.
        """
        recovery = self._ledger.take_up()
        for kept in recovery.ready:
            self.flights.take_back(await self._read_back(kept))
        for draw in recovery.issued:
            self._put_back(draw)
        return len(recovery.ready), len(recovery.issued)

    async def roll_back(self, step: int) -> int:
        """The learner stands at `step` again, on the version that is now the published one.

        Returns:
            How many tickets that were trained are ready again.
        """
        for flight in (*self.flights.under_way.values(), *self.flights.granted.values()):
            if flight.versions:
                flight.oldest_step = min(flight.oldest_step, self._versions.step_of(*flight.versions))
        returned = [await self._read_back(kept) for kept in self._ledger.roll_back(step)]
        self.flights.roll_back(step, returned)
        self._return_abandoned()
        self._return_hopeless(step)
        return len(returned)

    async def refresh(self, flights: list[Flight]) -> None:
        """Takes the columns of ready tickets from the journal again; the ones that they had may be lost."""
        kept = self._ledger.journalled(flight.ticket.ticket_id for flight in flights)
        for flight, ticket in zip(sorted(flights, key=lambda f: f.ticket.ticket_id), kept, strict=True):
            await self._pipeline.read_back(flight, ticket.journal_file, ticket.journal_sha256)

    async def _read_back(self, kept: JournalledTicket) -> Flight:
        draw = Draw(kept.ticket_id, kept.prompt_id, kept.redraw)
        recorded = self._recorded(draw)
        if recorded is not None:
            flight = self._replay_flight(draw, recorded)
        else:
            flight = self._flight(draw, self._versions.step_of(*kept.versions))
            flight.versions = kept.versions
        flight.reward_mean, flight.response_tokens = kept.reward_mean, kept.response_tokens
        await self._pipeline.read_back(flight, kept.journal_file, kept.journal_sha256)
        return flight

    def issue(self) -> None:
        """Issues as many tickets as the staleness contract and the free places allow."""
        settings, flights = self._settings, self.flights
        held = False
        while self.issuing and self._outcome.fatal is None and (due := flights.due(settings.steps)) is not None:
            if not due.may_issue():
                held = due is flights.fresh
                break
            if due is flights.replayed:
                self._launch_replay()
                continue
            oldest_step = settings.admission.oldest_step_for(due.outstanding, self._versions.published.step)
            member = self._pipeline.generation.take(settings.group_size, at_least(oldest_step))
            if member is None:
                break
            self._launch(member, self._again.popleft() if self._again else self._draw())
        # Held back: there are free places, and only the learner's progress allows to fill them.
        self.held.set(held and self._pipeline.generation.busy == 0)

    def _launch_replay(self) -> None:
        assert self._replays is not None
        try:
            draw = self._replays.next()
        except RunError as error:
            self._outcome.fail(error)
            return
        recorded = self._recorded(draw)
        assert recorded is not None
        flight = self._replay_flight(draw, recorded)
        self.flights.add(flight)
        flight.task = self._outcome.spawn(self._carry(flight, None))

    def _recorded(self, draw: Draw) -> Recorded | None:
        return None if self._replays is None else self._replays.recorded(draw.ticket_id)

    def _draw(self) -> Draw:
        return self._ledger.issue(lambda ticket_id: self._prompts.draw(ticket_id).prompt_id)

    def _launch(self, member: Member, draw: Draw) -> None:
        flight = self._flight(draw, oldest_step=member.step)
        flight.versions = (member.version,)  # the oldest that may sample it
        self.flights.add(flight)
        flight.task = self._outcome.spawn(self._carry(flight, member))

    def _flight(self, draw: Draw, oldest_step: int) -> Flight:
        ticket_id, prompt_id, redraw = draw
        problem = self._prompts.draw(ticket_id)
        if problem.prompt_id != prompt_id:
            raise RunError(
                f"ticket {ticket_id} was drawn as prompt {prompt_id}, the data now gives {problem.prompt_id}; a run "
                "goes on with the data it began with"
            )
        ticket = Ticket(
            ticket_id=ticket_id,
            redraw=redraw,
            prompt_id=prompt_id,
            prompt=problem.prompt,
            role=Role.POLICY,
            group_size=self._settings.group_size,
            stream=(self._settings.seed, int(Purpose.SAMPLING), ticket_id, redraw),
            messages=problem.messages,
            v_star=self._prompts.values.get(prompt_id),
        )
        return Flight(ticket, problem, oldest_step, issued_s=self._clock())

    def _replay_flight(self, draw: Draw, recorded: Recorded) -> Flight:
        ticket = Ticket(
            ticket_id=draw.ticket_id,
            redraw=draw.redraw,
            prompt_id=draw.prompt_id,
            prompt="",  # its tokens are recorded
            role=Role.REPLAY,
            group_size=self._settings.group_size,
            stream=(),
            v_star=self._prompts.values.get(draw.prompt_id),
            recorded=recorded,
        )
        # Nobody grades it again, so that its answer is not asked for.
        return Flight(ticket, Problem(draw.prompt_id, "", ""), oldest_step=0, issued_s=self._clock())

    async def _carry(self, flight: Flight, member: Member | None) -> None:
        """Takes one ticket through its stages until it is ready, dropped, or has to be had again.

        Args:
            member: where places are taken to sample it; None for one that is replayed.
        """
        ticket_id = flight.ticket.ticket_id
        if flight.aborted:  # before it began
            if member is not None:
                await self._pipeline.generation.give_back(member, self._settings.group_size)
            return
        try:
            if member is None:
                grades = await self._recall(flight)
            else:
                grades = await self._sample(flight, member)
            flight.reward_mean = grades.reward_sum / grades.rollouts
            journalled = await self._pipeline.journal(flight)
        except TicketFailedError as error:
            self.drop(flight, error.reason, error.detail)
            self._count_drop(error)
        except DataLostError as error:
            self._count_failure(flight, error)
            self.sample_again(flight, ReturnCause.DATA_LOST)
        else:
            self._ledger.mark_ready(ticket_id, journal_file=journalled, reward_mean=flight.reward_mean)
            self.flights.ready(flight, self._clock())
            self._return_abandoned()  # the learner may have gone back meanwhile
            self._drops_in_a_row = 0
        self.issue()
        await self._outcome.notify()

    async def _sample(self, flight: Flight, member: Member) -> Grades:
        """The first stages of a ticket that is sampled: generation, then grading and scoring."""
        # Looked at with every attempt: a roll-back may ask for less meanwhile.
        receipt = await self._pipeline.sample(flight, member, lambda m: m.step >= flight.oldest_step)
        flight.versions = receipt.versions
        flight.oldest_step = self._versions.step_of(*receipt.versions)
        self._generated(flight, receipt)
        if self._settings.opponents:
            await self._sample_opponents(flight)
        return await self._pipeline.grade_and_score(flight)

    async def _recall(self, flight: Flight) -> Grades:
        """The same of a ticket that is replayed: all but the scores of the reference model is recorded."""
        receipt, grades = await self._pipeline.recall(flight)
        self._generated(flight, receipt)
        if self._pipeline.reference is not None:
            flight.enter("reference", self._clock())
            await self._pipeline.score(flight)
        return grades

    def _generated(self, flight: Flight, receipt: GenerationReceipt) -> None:
        flight.response_tokens = receipt.response_tokens
        self.flights.sampled(flight, receipt.bytes)
        self._ledger.mark_generated(
            flight.ticket.ticket_id,
            versions=receipt.versions,
            rollouts=receipt.rollouts,
            response_tokens=receipt.response_tokens,
        )

    async def _sample_opponents(self, flight: Flight) -> None:
        """As many opponents as the ticket has responses, from the newest weights that the actors have of them.

        The noise is the ticket's, so that opponents of an actor that died are drawn again, and not others.
        """
        ticket, weights = flight.ticket, weights_of(Role.OPPONENT)
        met = await self._beside.sample(
            Role.OPPONENT,
            ticket.ticket_id,
            flight.problem,
            ticket.group_size,
            lambda member: member.others.get(weights, 0) >= self.first_opponent,
        )
        self._beside.done(met)
        flight.opponents = met.flight.generation

    def sample_again(self, flight: Flight, cause: ReturnCause, *, redraw: bool = False) -> None:
        """What was sampled for a ticket is lost or of no use: it is issued again, with the same noise.

        Args:
            redraw: with other noise.
        """
        self.flights.remove(flight)
        self._put_back(self._ledger.return_ticket(flight.ticket.ticket_id, cause, redraw=redraw))

    def _put_back(self, draw: Draw) -> None:
        if self._replays is not None and self._recorded(draw) is not None:
            self._replays.put_back(draw)
        else:
            # In the order of tickets, as they were drawn: synchronous batches depend on it.
            self._again = deque(sorted((*self._again, draw)))

    def drop(self, flight: Flight, reason: DropReason, detail: str) -> None:
        self.flights.remove(flight)
        self._ledger.drop(flight.ticket.ticket_id, reason, detail)

    def _count_drop(self, error: TicketFailedError) -> None:
        self._recorder.event("dropped", str(error))
        self._drops_in_a_row += 1
        limit = self._settings.drops_in_a_row
        if self._drops_in_a_row > limit:
            self._outcome.fail(
                RunError(
                    f"limits.drops_in_a_row: at most {limit} tickets may be dropped with none becoming ready between "
                    f"them, got {self._drops_in_a_row}; the last cause was {error}"
                )
            )

    def _count_failure(self, flight: Flight, error: DistrlError) -> None:
        where = f"ticket {flight.ticket.ticket_id} in {flight.stage}"
        self._recorder.failed_call(flight.stage, f"{where}: {error}")
        if flight.ticket.role in (Role.POLICY, Role.REPLAY):
            self._ledger.count_attempt(flight.ticket.ticket_id, flight.stage, str(error))

    def choose(self, step: int) -> list[Flight]:
        """The batch of the step from learner step `step`, in the order of ticket ids; empty: not yet."""
        batch = self.flights.choose(step)
        if not batch and self._return_hopeless(step):
            self.issue()
            batch = self.flights.choose(step)
        if not batch and (overdue := self.flights.overdue(step)):
            for flight in overdue:
                self._redraw(flight)
            batch = self.flights.choose(step)
        return batch

    def _redraw(self, flight: Flight) -> None:
        """Aborts a ticket that the next step would make too stale, and draws it again, or drops it."""
        ticket, limit = flight.ticket, self._settings.redraws
        stage = flight.stage
        flight.abort()
        if ticket.redraw < limit:
            self.sample_again(flight, ReturnCause.REDRAWN, redraw=True)
            self._recorder.event("redrawn", f"ticket {ticket.ticket_id} in {stage}, draw {ticket.redraw + 1}")
            return
        error = TicketFailedError(
            DropReason.TOO_STALE,
            f"ticket {ticket.ticket_id} was not ready in time in {limit + 1} draws (limits.redraws = {limit})",
        )
        self.drop(flight, error.reason, error.detail)
        self._count_drop(error)

    def _return_abandoned(self) -> None:
        """Ready tickets of weights that were left are sampled again, where the run wants none of them."""
        if not self._settings.drop_abandoned:
            return
        for flight in [f for f in self.flights.under_way.values() if f.ready and f.versions]:
            if self._versions.abandoned(flight.versions):
                self.sample_again(flight, ReturnCause.ABANDONED)

    def _return_hopeless(self, step: int) -> int:
        """Ready tickets too far from the weights that the learner was rolled back to are sampled again; how many."""
        hopeless = self.flights.hopeless(step)
        for flight in hopeless:
            self.sample_again(flight, ReturnCause.TOO_STALE)
        if hopeless:
            self._recorder.event("returned", f"{len(hopeless)} tickets of weights that were left are sampled again")
        return len(hopeless)


def _streams(settings: CoordinatorSettings, trained_steps: int) -> Streams:
    fresh = replayed = None
    if settings.admission.tickets_per_step:
        fresh = Flights(settings.admission, settings.on_stale, settings.ready_bytes, trained_steps)
    if settings.replays_per_step:
        alone = fresh is None
        replayed = ReplayedFlights(settings.replays_per_step, settings.ready_bytes, trained_steps, alone=alone)
    return Streams(fresh, replayed)


def at_least(step: int) -> Callable[[Member], bool]:
    """Members whose weights have done `step` optimizer steps."""
    return lambda member: member.step >= step
