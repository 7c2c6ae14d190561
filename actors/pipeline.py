"""Takes one ticket through its stages: generation, then grading and reference scoring at once, then the journal."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from actors.calls import Caller, DataLostError, WorkerLostError
from actors.coalescer import Coalescer
from actors.flight import Flight
from actors.pool import Member, Pool, unsuspected
from distrl.errors import DistrlError, RunError, StageError
from distrl.messages import GenerationReceipt, JournalReceipt
from distrl.schema import Role
from distrl.tickets import DropReason

OUTAGE_POLL_S = 0.2
"""Seconds between two calls to a journal that is being replaced."""


class TicketFailedError(Exception):
    """A ticket used up its attempts in one stage; it is dropped with this reason."""

    def __init__(self, reason: DropReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class PipelineLimits:
    """Bounds of the calls; see `distrl.config_sections.LimitsConfig` and the stages' sections."""

    attempts: int
    retry_delay_s: float
    outage_s: float
    """How long the journal may be away before a ticket's call counts as failed."""
    generation_timeout_s: float
    grading_timeout_s: float
    reference_timeout_s: float
    journal_timeout_s: float
    grading_tickets_per_call: int
    reference_tickets_per_call: int


@dataclass(frozen=True, slots=True)
class Grades:
    """What the coordinator learns of a ticket's grading."""

    reward_sum: float
    correct: int
    rollouts: int
    components: Mapping[str, float]
    """Means over the rollouts."""


class Pipeline:
    """Calls the stages and keeps the references; never touches the data.

    Args:
        generation: samples what is trained, and what no pool of its own samples.
        clock: seconds since the epoch.
        own_pools: generation actors that sample for one role only.
    """

    def __init__(
        self,
        generation: Pool,
        grading: Pool,
        reference: Pool | None,
        journal: Caller,
        limits: PipelineLimits,
        clock: Callable[[], float],
        own_pools: Mapping[Role, Pool] | None = None,
        episodes: bool = False,
    ) -> None:
        self.generation = generation
        self._episodes = episodes
        self.own_pools = own_pools or {}
        self.grading = grading
        self.reference = reference
        self._journal = journal
        self._limits = limits
        self._clock = clock
        self.on_failure: Callable[[Flight, DistrlError], None] = lambda flight, error: None
        """Told of every failed call."""
        self.on_graded: Callable[[Flight, Grades], None] = lambda flight, grades: None
        """Told of every ticket that was graded."""
        self.on_loss: Callable[[Member, str], None] = lambda member, cause: None
        """Told of every member that was taken out, with the cause."""
        self.rollouts: Counter[str] = Counter()
        """Rollouts that each stage has finished so far."""
        stages = ["generation", "grading", "journal"]
        stages += ["reference"] if reference is not None else []
        stages += ["replay"] if Role.REPLAY in self.own_pools else []
        self.retries: Counter[str] = Counter(dict.fromkeys(stages, 0))
        """Calls that were made again so far; calls of an unknown outcome count, too."""
        self.truncated = 0
        """Of the sampled rollouts those that were cut at `max_new_tokens`."""
        self.generated_tokens = 0
        suspect = self._is_suspect
        self._grade_calls = Coalescer(grading, limits.grading_tickets_per_call, self._call_grading, suspect)
        if reference is not None:
            self._score_calls = Coalescer(reference, limits.reference_tickets_per_call, self._call_reference, suspect)

    def pool_of(self, role: str) -> Pool:
        """The generation actors that sample for a role."""
        return self.own_pools.get(Role(role), self.generation)

    async def sample(self, flight: Flight, member: Member | None, fits: Callable[[Member], bool]) -> GenerationReceipt:
        """Samples the ticket's responses.

        Args:
            member: where `ticket.group_size` places are already taken for the first attempt, or None.
            fits: which members may sample it.
        Raises:
            TicketFailedError: every attempt failed.
        """
        places = flight.ticket.group_size
        pool = self.pool_of(flight.ticket.role)
        first = member

        async def attempt() -> GenerationReceipt:
            nonlocal first
            suspect = self._is_suspect(flight)
            if first is None:
                flight.call("generation", "", self._clock())
            here = first or await pool.wait_take(places, (lambda m: unsuspected(m) and fits(m)) if suspect else fits)
            first = None
            here.suspects += suspect
            flight.enter("generation", self._clock())
            flight.call("generation", here.name, flight.stage_since_s)
            try:
                answer: GenerationReceipt
                # Graders get the problem; generation needs it only to play an episode.
                given = (flight.ticket, flight.problem) if self._episodes else (flight.ticket,)
                async with self._judge(pool, here, [flight]):
                    answer, flight.generation = await here.caller.batch(
                        "generate", *given, timeout_s=self._limits.generation_timeout_s
                    )
            finally:
                here.suspects -= suspect
                await pool.give_back(here, places)
            return answer

        receipt: GenerationReceipt = await self._attempts(flight, DropReason.GENERATION_FAILED, attempt)
        self._span(flight, "generation", flight.stage_since_s)
        self.truncated += receipt.truncated
        self.generated_tokens += receipt.response_tokens
        return receipt

    async def recall(self, flight: Flight) -> tuple[GenerationReceipt, Grades]:
        """Takes the ticket's responses with their grades from the recording of another run.

        Raises:
            TicketFailedError: every attempt failed. RunError: the recording is damaged.
        """
        pool, places = self.pool_of(Role.REPLAY), flight.ticket.group_size
        timeout_s = self._limits.journal_timeout_s

        async def attempt() -> tuple[GenerationReceipt, Grades]:
            flight.call("replay", "", self._clock())
            member = await pool.wait_take(places)
            flight.enter("replay", self._clock())
            flight.call("replay", member.name, flight.stage_since_s)
            try:
                async with self._judge(pool, member, [flight]):
                    read, flight.generation = await member.caller.batch("generate", flight.ticket, timeout_s=timeout_s)
                    graded, flight.grading = await member.caller.batch("grades", flight.ticket, timeout_s=timeout_s)
            finally:
                await pool.give_back(member, places)
            return read, Grades(graded.reward_sums[0], graded.correct[0], graded.rollouts[0], graded.components[0])

        receipt: tuple[GenerationReceipt, Grades] = await self._attempts(flight, DropReason.REPLAY_FAILED, attempt)
        self._span(flight, "replay", flight.stage_since_s)
        return receipt

    async def grade_and_score(self, flight: Flight) -> Grades:
        """Grades the responses and, if the run has reference actors, scores them at the same time."""
        flight.enter("grading", self._clock())
        grading = asyncio.create_task(self.grade(flight))
        tasks: list[asyncio.Task[Any]] = [grading]
        if self.reference is not None:
            tasks.append(asyncio.create_task(self.score(flight)))
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return grading.result()

    async def grade(self, flight: Flight) -> Grades:
        began = self._clock()

        async def attempt() -> tuple[Grades, Any]:
            flight.call("grading", "", self._clock())
            return await self._grade_calls.submit(flight)

        grades, flight.grading = await self._attempts(flight, DropReason.GRADING_FAILED, attempt)
        flight.answered("grading")
        self._span(flight, "grading", began)
        self.on_graded(flight, grades)
        return grades  # type: ignore[no-any-return]

    async def score(self, flight: Flight) -> None:
        """Scores the responses with the reference model; only where the run has reference actors."""
        began = self._clock()

        async def attempt() -> tuple[None, Any]:
            flight.call("reference", "", self._clock())
            return await self._score_calls.submit(flight)

        _, flight.reference = await self._attempts(flight, DropReason.REFERENCE_FAILED, attempt)
        flight.answered("reference")
        self._span(flight, "reference", began)

    async def journal(self, flight: Flight) -> JournalReceipt:
        """Writes the joined rollouts to disk; returns when they are safe there."""
        flight.enter("journal", self._clock())
        flight.call("journal", self._journal.name, flight.stage_since_s)

        async def attempt() -> JournalReceipt:
            columns = (flight.generation, flight.grading, flight.reference)
            answer: JournalReceipt = await self._patiently(
                lambda: self._journal.ask("append", *columns, timeout_s=self._limits.journal_timeout_s)
            )
            return answer

        receipt: JournalReceipt = await self._attempts(flight, DropReason.JOURNAL_FAILED, attempt)
        self._span(flight, "journal", flight.stage_since_s)
        return receipt

    async def _patiently(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Calls the journal; while its process is being replaced, calls again. No ticket is to blame for that."""
        deadline = self._clock() + self._limits.outage_s
        while True:
            try:
                return await call()
            except WorkerLostError:
                if self._clock() >= deadline:
                    raise
            await asyncio.sleep(OUTAGE_POLL_S)

    async def read_back(self, flight: Flight, path: str, sha256: str) -> None:
        """Takes the rollouts of a ticket from the journal, where they were put earlier.

        Raises:
            DistrlError: the file is missing or damaged; nothing is sampled in its place without being told.
        """
        ticket, timeout_s = flight.ticket, self._limits.journal_timeout_s
        _, rows = await self._patiently(
            lambda: self._journal.batch("read", path, sha256, ticket.ticket_id, ticket.redraw, timeout_s=timeout_s)
        )
        flight.generation = flight.grading = rows
        flight.reference = rows if self.reference is not None else None

    async def _attempts(self, flight: Flight, reason: DropReason, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Makes a call until it succeeds, at most `limits.attempts` times, with a growing delay between.

        A worker that dies takes no attempt: that is seldom the ticket's fault. As many deaths as attempts, though, are.

        Raises:
            TicketFailedError: every attempt failed. RunError: the run cannot go on, whatever the ticket.
            DataLostError: the ticket must be sampled again.
        """
        failures = 0
        while True:
            try:
                return await attempt()
            except (RunError, DataLostError):
                raise  # no fault of the ticket, and no other attempt mends it
            except WorkerLostError as error:
                flight.losses += 1
                self.on_failure(flight, error)
                if flight.losses >= self._limits.attempts:
                    detail = f"{flight.losses} workers died that had it; the last was {error}"
                    raise TicketFailedError(DropReason.POISON, detail) from error
            except DistrlError as error:
                failures += 1
                self.on_failure(flight, error)
                if failures >= self._limits.attempts:
                    raise TicketFailedError(reason, str(error)) from error
            self.retries[reason.removesuffix("_failed")] += 1
            await asyncio.sleep(self._limits.retry_delay_s * 2 ** max(0, failures - 1))

    def _is_suspect(self, flight: Flight) -> bool:
        """Whether one more dead worker would convict the ticket: it then shares no worker with another such.

        Tickets that were merely beside the culprit are thereby told apart from it.
        """
        return flight.losses > 0 and flight.losses >= self._limits.attempts - 1

    @asynccontextmanager
    async def _judge(self, pool: Pool, member: Member, flights: Sequence[Flight]) -> AsyncIterator[None]:
        """Takes the member out when the call shows that it is dead, or that it fails where others do not."""
        try:
            yield
        except WorkerLostError as error:
            await self.lose(pool, member, str(error))
            raise
        except (RunError, DataLostError):
            raise
        except DistrlError as error:
            if pool.failed(member, [f.ticket.ticket_id for f in flights], self._limits.attempts):
                limit = self._limits.attempts
                cause = f"{limit} different tickets in a row failed there and not elsewhere; the last: {error}"
                await self.lose(pool, member, cause)
            raise
        else:
            pool.succeeded(member)

    async def lose(self, pool: Pool, member: Member, cause: str) -> None:
        """Takes a member out; whoever supervises the processes replaces it."""
        if member in pool.members:
            await pool.lose(member, cause)
            self.on_loss(member, cause)

    async def _call_grading(self, member: Member, jobs: Sequence[Flight]) -> tuple[list[Grades | StageError], Any]:
        problems = {f.ticket.prompt_id: f.problem for f in jobs}
        for flight in jobs:
            flight.call("grading", member.name, self._clock())
        async with self._judge(self.grading, member, jobs):
            receipt, batch = await member.caller.batch(
                "grade",
                problems,
                *[f.generation for f in jobs],
                *[f.opponents for f in jobs if f.opponents is not None],
                timeout_s=self._limits.grading_timeout_s,
            )
        sums = (receipt.reward_sums, receipt.correct, receipt.rollouts, receipt.components)
        rows = zip(*sums, receipt.failures, strict=True)
        return [Grades(*row) if failure is None else StageError(failure) for *row, failure in rows], batch

    async def _call_reference(self, member: Member, jobs: Sequence[Flight]) -> tuple[list[None], Any]:
        assert self.reference is not None
        for flight in jobs:
            flight.call("reference", member.name, self._clock())
        async with self._judge(self.reference, member, jobs):
            _, batch = await member.caller.batch(
                "score", *[f.generation for f in jobs], timeout_s=self._limits.reference_timeout_s
            )
        return [None] * len(jobs), batch

    def _span(self, flight: Flight, stage: str, began: float) -> None:
        flight.timeline.append((stage, began, self._clock()))
        self.rollouts[stage] += flight.ticket.group_size
