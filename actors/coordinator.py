"""The coordinator: issues tickets, sees them through the stages, forms batches, follows policy versions.

It holds references and small receipts, never rollouts. It is a plain class with asynchronous methods; nothing here
knows whether the stages are actors or objects in the same process.
"""

import asyncio
import shutil
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from actors.evaluation import Evaluation, Evaluator
from actors.flight import Flight
from actors.flights import Flights
from actors.pipeline import Pipeline, TicketFailedError
from actors.pool import Member
from actors.recorder import Recorder
from actors.waits import Stopwatch, WaitReport, blame
from distrl.errors import DeadlineError, DistrlError, LedgerError, RunError
from distrl.ledger import Ledger
from distrl.messages import BatchGrant, LoadReceipt, StepReport, TicketGrant
from distrl.schema import Role
from distrl.seeding import Purpose
from distrl.staleness import Admission, Version, staleness
from distrl.tasks.problem import Problem
from distrl.tickets import DropReason, Ticket


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    """The part of the config that the coordinator reads; see there for units."""

    seed: int
    steps: int
    group_size: int
    admission: Admission
    on_stale: str
    call_attempts: int
    sync_timeout_s: float
    ready_bytes: int
    drops_in_a_row: int
    evaluate_every_steps: int
    keep_checkpoints: int


@dataclass(frozen=True, slots=True)
class Prompts:
    """Where tickets and evaluations get their problems from."""

    draw: Callable[[int], Problem]
    """Ticket number to problem, a pure function."""
    heldout: Sequence[Problem]
    """For the evaluations before and after training."""
    heldout_during: Sequence[Problem]


class Coordinator:
    """Runs the schedule of one training run.

    Args:
        pipeline: the stages.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        ledger: Ledger,
        prompts: Prompts,
        pipeline: Pipeline,
        recorder: Recorder,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._prompts = prompts
        self._pipeline = pipeline
        self._recorder = recorder
        self._clock = clock
        self._evaluator = Evaluator(pipeline, settings.seed, clock)
        self._reissue: deque[tuple[int, str]] = deque()  # tickets of an earlier process that must be sampled again
        self._versions = ledger.versions()
        resumed = ledger.last_checkpoint()
        if resumed is None:
            first = Version(ledger.allocate_version(None, 0), None, 0)
            self._versions[first.version] = first
            self._published = first
        else:
            self._published = self._versions[resumed.version]
        self._resumed = resumed is not None
        self._step = self._published.step  # steps granted so far
        self._flights = Flights(settings.admission, settings.on_stale, settings.ready_bytes, self._step)
        self._stopping = False
        self._issuing = False
        self._drops_in_a_row = 0
        self._fatal: BaseException | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Condition()
        self._held = Stopwatch(clock)
        self._waits = WaitReport()
        self._learner_waits_since: float | None = None
        self._may_load = asyncio.Event()
        self._recovered = asyncio.Event()
        self.done = asyncio.Event()
        pipeline.generation.on_change(self._issue)
        pipeline.on_failure = self._count_failure

    # The run ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to issue tickets, beside the first evaluation."""
        for member in self._pipeline.generation.members:
            self._spawn(self._follow(member))
        self._spawn(self._go_on() if self._resumed else self._begin())

    async def _go_on(self) -> None:
        """Takes up what an earlier process left: ready tickets from the journal, the others are sampled again.

        New weights are loaded, and tickets issued, when the learner has published the checkpoint's weights again.
        """
        recovery = self._ledger.recover(self._step)
        for kept in recovery.ready:
            oldest_step = self._versions[kept.oldest_version].step
            flight = self._flight(kept.ticket_id, kept.prompt_id, oldest_step)
            flight.oldest_version, flight.newest_version = kept.oldest_version, kept.newest_version
            flight.reward_mean, flight.response_tokens = kept.reward_mean, kept.response_tokens
            await self._pipeline.read_back(flight, kept.journal_file, kept.journal_sha256)
            self._flights.add(flight)
            self._flights.ready(flight, self._clock())
        self._reissue.extend(recovery.issued)
        self._recorder.event(
            "resumed",
            f"at step {self._step} with {len(recovery.ready)} tickets from the journal and {len(recovery.issued)} to "
            "sample again",
        )
        self._recovered.set()
        await self._notify()

    async def _begin(self) -> None:
        # Tickets are sampled beside the first evaluation, but no new weights are loaded before its end.
        self._issuing = True
        self._issue()
        await self._evaluate("before", self._prompts.heldout)
        self._may_load.set()

    async def _finish(self) -> None:
        self._issuing = False
        await self._evaluate("after", self._prompts.heldout)
        for flight in list(self._flights.under_way.values()):
            self._drop(flight, DropReason.RUN_ENDED, "the run had all the steps it was asked for")
        self._recorder.event("done", "all steps are trained and evaluated")
        self.done.set()
        await self._notify()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Runs a task whose failure ends the run: nothing that goes wrong here may be silent."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)

    def _end_task(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Ends the run with this cause; every later call of the learner or the driver gets it."""
        if self._fatal is None:
            if isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self._fatal = error
            self._recorder.event("failed", f"{type(error).__name__}: {error}")
        asyncio.get_running_loop().create_task(self._notify())

    async def request_stop(self) -> None:
        """Ends the run after the step under way: issues nothing more, and the learner's next batch is none."""
        self._stopping = True
        self._issuing = False
        self._recorder.event("stopping", "after the step under way")
        await self._notify()

    async def abort(self, reason: str) -> None:
        """Ends the run now: whoever waits for a batch gets a RunError with the reason."""
        if self._fatal is None:
            self._fatal = RunError(reason)
        await self._notify()

    def check(self) -> None:
        """Raises what ended the run, if something did."""
        if isinstance(self._fatal, DistrlError):
            raise self._fatal
        if self._fatal is not None:
            raise RunError(f"the coordinator failed: {type(self._fatal).__name__}: {self._fatal}") from self._fatal

    # Tickets ----------------------------------------------------------------------------------------------------

    def _issue(self) -> None:
        """Issues as many tickets as the staleness contract and the free places allow."""
        settings, flights = self._settings, self._flights
        held = False
        while self._issuing and self._fatal is None and flights.wanted(settings.steps) > 0:
            if not flights.may_issue():
                held = True
                break
            oldest_step = settings.admission.oldest_step_for(flights.outstanding, self._published.step)
            member = self._pipeline.generation.take(settings.group_size, _at_least(oldest_step))
            if member is None:
                break
            self._launch(member, *(self._reissue.popleft() if self._reissue else self._draw()))
        # Held back: there are free places, and only the learner's progress allows to fill them.
        self._held.set(held and self._pipeline.generation.busy == 0)

    def _draw(self) -> tuple[int, str]:
        return self._ledger.issue(lambda ticket_id: self._prompts.draw(ticket_id).prompt_id)

    def _launch(self, member: Member, ticket_id: int, prompt_id: str) -> None:
        flight = self._flight(ticket_id, prompt_id, oldest_step=member.step)
        self._flights.add(flight)
        self._spawn(self._carry(flight, member))

    def _flight(self, ticket_id: int, prompt_id: str, oldest_step: int) -> Flight:
        problem = self._prompts.draw(ticket_id)
        if problem.prompt_id != prompt_id:
            raise RunError(
                f"ticket {ticket_id} was drawn as prompt {prompt_id}, the data now gives {problem.prompt_id}; a run "
                "goes on with the data it began with"
            )
        ticket = Ticket(
            ticket_id=ticket_id,
            redraw=0,
            prompt_id=prompt_id,
            prompt=problem.prompt,
            role=Role.POLICY,
            group_size=self._settings.group_size,
            stream=(self._settings.seed, int(Purpose.SAMPLING), ticket_id, 0),
            messages=problem.messages,
        )
        return Flight(ticket, problem, oldest_step, issued_s=self._clock())

    async def _carry(self, flight: Flight, member: Member) -> None:
        """Takes one ticket through its stages until it is ready or dropped."""
        ticket_id = flight.ticket.ticket_id
        needed_step = flight.oldest_step
        try:
            receipt = await self._pipeline.sample(flight, member, _at_least(needed_step))
            flight.oldest_version, flight.newest_version = receipt.oldest_version, receipt.newest_version
            flight.oldest_step = self._versions[receipt.oldest_version].step
            flight.response_tokens = receipt.response_tokens
            self._flights.sampled(flight, receipt.bytes)
            self._ledger.mark_generated(
                ticket_id,
                oldest_version=receipt.oldest_version,
                newest_version=receipt.newest_version,
                rollouts=receipt.rollouts,
                response_tokens=receipt.response_tokens,
            )
            grades = await self._pipeline.grade_and_score(flight)
            flight.reward_mean = grades.reward_sum / grades.rollouts
            journalled = await self._pipeline.journal(flight)
        except TicketFailedError as error:
            self._drop(flight, error.reason, error.detail)
            self._count_drop(error)
        else:
            self._ledger.mark_ready(ticket_id, journal_file=journalled, reward_mean=flight.reward_mean)
            self._flights.ready(flight, self._clock())
            self._drops_in_a_row = 0
        self._issue()
        await self._notify()

    def _drop(self, flight: Flight, reason: DropReason, detail: str) -> None:
        self._flights.remove(flight)
        self._ledger.drop(flight.ticket.ticket_id, reason, detail)

    def _count_drop(self, error: TicketFailedError) -> None:
        self._recorder.event("dropped", str(error))
        self._drops_in_a_row += 1
        limit = self._settings.drops_in_a_row
        if self._drops_in_a_row > limit:
            self.fail(
                RunError(
                    f"limits.drops_in_a_row: at most {limit} tickets may be dropped with none becoming ready between "
                    f"them, got {self._drops_in_a_row}; the last cause was {error}"
                )
            )

    def _count_failure(self, flight: Flight, error: DistrlError) -> None:
        self._recorder.event("failed_call", f"ticket {flight.ticket.ticket_id} in {flight.stage}: {error}")
        if flight.ticket.role == Role.POLICY:
            self._ledger.count_attempt(flight.ticket.ticket_id)

    # Batches ----------------------------------------------------------------------------------------------------

    async def next_batch(self, step: int) -> BatchGrant | None:
        """The batch of optimizer step number `step` (the first is 1), as soon as the contract allows it.

        None when the run was asked to stop: the learner makes a checkpoint and ends.

        Raises:
            RunError: the run failed, or steps are asked for out of order.
        """
        if step != self._step + 1:
            raise RunError(f"the learner must ask for step {self._step + 1} next, got {step}")
        began = self._learner_waits_since = self._clock()
        async with self._changed:
            while not (batch := self._flights.choose(self._step)) and not self._stopping:
                self.check()
                await self._changed.wait()
        self.check()
        self._learner_waits_since = None
        if self._stopping:
            return None
        last = max(batch, key=lambda f: f.stage_since_s)
        self._waits.add(blame((began, self._clock()), last.timeline))
        self._step = step
        tickets = [self._grant(flight) for flight in batch]
        self._issue()
        return BatchGrant(step, tuple(tickets))

    def _grant(self, flight: Flight) -> TicketGrant:
        ticket_id = flight.ticket.ticket_id
        # The step before may not be published yet; its weights are what this batch is trained on all the same.
        behind = (self._step - 1) - self._published.step
        age = staleness(self._versions, flight.oldest_version, self._published.version) + behind
        bound = self._settings.admission.max_staleness
        if self._settings.on_stale == "wait" and age > bound:
            raise LedgerError(
                f"ticket {ticket_id} would be trained with staleness {age}, train.max_staleness is {bound}; "
                "this is a fault of distrl, please report it"
            )
        self._flights.grant(flight)
        return TicketGrant(ticket_id, flight.generation, flight.grading, flight.reference, age)

    # Policy versions --------------------------------------------------------------------------------------------

    async def trained(self, report: StepReport, staleness_by_ticket: dict[int, int]) -> int:
        """The learner has done a step. Returns the version number for the weights it made."""
        self.check()
        self._ledger.mark_trained(report.step, staleness_by_ticket)
        trained = self._flights.trained(report.step, staleness_by_ticket)
        rewards, tokens = [f.reward_mean for f in trained], sum(f.response_tokens for f in trained)
        self._recorder.step(report, rewards, list(staleness_by_ticket.values()), tokens)
        return self._ledger.allocate_version(self._published.version, report.step)

    async def restored(self, step: int) -> int:
        """The learner holds the last checkpoint's weights; the version number to publish them under again."""
        # Until the ledger's tickets are taken up, none may be issued: they could not be told apart.
        async with self._changed:
            while not self._recovered.is_set():
                self.check()
                await self._changed.wait()
        if step != self._step:
            raise RunError(f"the learner must go on from step {self._step}, the ledger's last checkpoint, got {step}")
        return self._ledger.allocate_version(self._published.version, step)

    async def published(self, version: int, step: int, manifest_sha256: str) -> None:
        """The weights of `version` are in the policy store; generation actors are told to pull them."""
        self._ledger.mark_published(version, manifest_sha256)
        self._published = Version(version, self._published.version, step)
        self._versions[version] = self._published
        self._flights.release()
        every = self._settings.evaluate_every_steps
        if self._resumed:
            self._resumed, self._issuing = False, not self._stopping
            self._may_load.set()
        if step == self._settings.steps:
            self._spawn(self._finish())
        elif every and step % every == 0:
            # Synchronous training waits for the evaluation: otherwise its responses would depend on timing.
            self._issuing = self._issuing and self._settings.admission.max_staleness > 0
            self._spawn(self._evaluate_during())
        await self._notify()
        self._issue()

    async def commit_checkpoint(self, path: str, step: int, version: int, sha256: str) -> None:
        """A checkpoint is complete on disk: its tickets are committed with it."""
        tickets = self._ledger.commit_checkpoint(path, step=step, version=version, sha256=sha256)
        self._recorder.event("checkpoint", f"step {step}, {tickets} tickets committed: {path}")
        # The ledger gives a checkpoint up before its files go: a crash between the two leaves files, not a gap.
        for old in self._ledger.remove_checkpoints(self._settings.keep_checkpoints):
            try:
                await asyncio.to_thread(shutil.rmtree, old.path)
            except OSError as error:
                self._recorder.event("failed_call", f"removing the checkpoint {old.path}: {error}")
            else:
                self._recorder.event("checkpoint", f"step {old.step} removed: {old.path}")

    async def _follow(self, member: Member) -> None:
        """Keeps one generation actor at the newest version; a pull that fails is made again, with a bound."""
        failures = 0
        await self._may_load.wait()
        while True:
            async with self._changed:
                while member.version == self._published.version:
                    await self._changed.wait()
            target = self._published
            try:
                receipt: LoadReceipt = await member.caller.ask(
                    "pull", target.version, timeout_s=self._settings.sync_timeout_s
                )
            except DistrlError as error:
                failures += 1
                self._recorder.event("failed_call", f"{member.name} pulling version {target.version}: {error}")
                if failures >= self._settings.call_attempts:
                    raise DeadlineError(
                        f"{member.name} must load policy version {target.version} in at most "
                        f"{self._settings.call_attempts} attempts; the last error was: {error}"
                    ) from error
                continue
            failures = 0
            member.version = receipt.version
            member.step = self._versions[receipt.version].step
            self._recorder.load(member.name, receipt)
            await self._pipeline.generation.changed()

    # Evaluation -------------------------------------------------------------------------------------------------

    async def _evaluate_during(self) -> None:
        await self._evaluate("during", self._prompts.heldout_during)
        self._issuing = not self._stopping
        self._issue()

    async def _evaluate(self, name: str, problems: Sequence[Problem]) -> None:
        step = self._published.step
        result: Evaluation = await self._evaluator.run(name, problems, step, _at_least(step))
        self._ledger.record_evaluation(result.row())
        self._recorder.evaluation(result.row())

    # Reports ----------------------------------------------------------------------------------------------------

    async def snapshot(self, after: int) -> dict[str, Any]:
        """What the driver shows: records with a number above `after`, tickets by state, who waits for whom."""
        pools = [self._pipeline.generation, self._pipeline.grading]
        if self._pipeline.reference is not None:
            pools.append(self._pipeline.reference)
        return {
            "records": self._recorder.after(after),
            "done": self.done.is_set(),
            "stopping": self._stopping,
            "failed": None if self._fatal is None else f"{type(self._fatal).__name__}: {self._fatal}",
            "step": self._published.step,
            **self._flights.report(self._clock()),
            "rollouts": dict(self._pipeline.rollouts),
            "learner_waiting": self._learner_waits_since is not None,
            "generation_held": self._held.running,
            "tickets": self._ledger.counts(),
            "drops": self._ledger.drops(),
            "max_staleness": self._ledger.max_staleness(),
            "learner_waits_s": dict(self._waits.learner_s),
            "generation_held_s": self._held.read(),
            "busy": {pool.stage: pool.busy for pool in pools},
        }

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _at_least(step: int) -> Callable[[Member], bool]:
    """Members whose weights have done `step` optimizer steps."""
    return lambda member: member.step >= step
