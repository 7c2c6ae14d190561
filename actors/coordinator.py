"""The coordinator: issues tickets, sees them through the stages, forms batches, follows policy versions.

It holds references and small receipts, never rollouts. It is a plain class with asynchronous methods; nothing here
knows whether the stages are actors or objects in the same process.
"""

import asyncio
import shutil
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.evaluation import Evaluation, Evaluator
from actors.flight import Flight
from actors.flights import Flights
from actors.pipeline import Pipeline, TicketFailedError
from actors.pool import Member
from actors.recorder import Recorder
from actors.turns import Turns
from actors.updates import UpdateLimits, Updates
from actors.waits import Stopwatch, WaitReport, blame
from distrl.errors import DistrlError, LedgerError, RunError
from distrl.ledger import Draw, JournalledTicket, Ledger
from distrl.messages import BatchGrant, PublishAgain, StepReport, TicketGrant
from distrl.schema import Role
from distrl.seeding import Purpose
from distrl.staleness import Admission, Outstanding, Version, most_stale
from distrl.tasks.problem import Problem
from distrl.tickets import POLICY_WEIGHTS, DropReason, ReturnCause, Ticket, weights_of


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    """The part of the config that the coordinator reads; see there for units."""

    seed: int
    steps: int
    group_size: int
    admission: Admission
    on_stale: str
    updates: UpdateLimits
    ready_bytes: int
    drops_in_a_row: int
    evaluate_every_steps: int
    keep_checkpoints: int
    turns: bool = False
    """Whether generation and learner take turns on one device; only with a staleness bound of 0."""
    opponents: bool = False
    """Whether something is sampled from weights that are published for opponents."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Where tickets and evaluations get their problems from."""

    draw: Callable[[int], Problem]
    """Ticket number to problem, a pure function."""
    heldout: Sequence[Problem]
    """For the evaluations before and after training."""
    heldout_during: Sequence[Problem]
    values: Mapping[str, float] = field(default_factory=dict)
    """V* by prompt id; empty where the objective reads none."""


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
        self._reissue: deque[Draw] = deque()  # tickets of an earlier process that must be sampled again
        self._versions = ledger.versions()
        resumed = ledger.last_checkpoint()
        if resumed is None:
            first = Version(ledger.allocate_version(None, 0), None, 0)
            self._versions[first.version] = first
            start = first
        else:
            start = self._versions[resumed.version]
        self._resumed = resumed is not None
        self._step = start.step  # steps granted so far
        self._flights = Flights(settings.admission, settings.on_stale, settings.ready_bytes, self._step)
        self._stopping = False
        self._issuing = False
        self._drops_in_a_row = 0
        self._fatal: BaseException | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Condition()
        self._updates = Updates(self._versions, start, settings.updates, recorder, self._changed, self.fail)
        # No weights of opponents are there before the first publication: engines start from the policy's.
        self._opponents = Updates(
            {}, Version(0, None, 0), settings.updates, recorder, self._changed, self.fail, weights_of(Role.OPPONENT)
        )
        self._may_load = asyncio.Event()
        """Set once the weights may change that sample for training."""
        self._held = Stopwatch(clock)
        self._waits = WaitReport()
        self._learner_waits_since: float | None = None
        self._recovered = asyncio.Event()
        self._turns = (
            Turns([pipeline.generation, *pipeline.own_pools.values()], settings.updates.sync_timeout_s)
            if settings.turns
            else None
        )
        self.done = asyncio.Event()
        pipeline.generation.on_change(self._issue)
        pipeline.on_failure = self._count_failure

    # The run ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to issue tickets, beside the first evaluation."""
        pipeline = self._pipeline
        awake = None if self._turns is None else self._turns.awake
        for member in pipeline.generation.members:
            self._spawn(self._updates.follow(pipeline.generation, member, self._may_load, awake))
        if (apart := pipeline.own_pools.get(Role.EVALUATION)) is not None:
            for member in apart.members:
                self._spawn(self._updates.follow(apart, member, self._evaluator.may_load, awake))
        if self._settings.opponents:
            pool = pipeline.pool_of(Role.OPPONENT)
            for member in pool.members:
                self._spawn(self._opponents.follow(pool, member, self._may_load, awake))
        self._spawn(self._go_on() if self._resumed else self._begin())

    async def _go_on(self) -> None:
        """Takes up what an earlier process left: ready tickets from the journal, the others are sampled again.

        New weights are loaded, and tickets issued, when the learner has published the checkpoint's weights again.
        """
        recovery = self._ledger.recover(self._step)
        useless = self._useless(recovery.ready)
        for kept in recovery.ready:
            if kept.ticket_id in useless:
                continue
            oldest_step = self._oldest_step(kept.versions)
            flight = self._flight(Draw(kept.ticket_id, kept.prompt_id, kept.redraw), oldest_step)
            flight.versions = kept.versions
            flight.oldest_version, flight.newest_version = kept.oldest_version, kept.newest_version
            flight.reward_mean, flight.response_tokens = kept.reward_mean, kept.response_tokens
            await self._pipeline.read_back(flight, kept.journal_file, kept.journal_sha256)
            self._flights.add(flight)
            self._flights.ready(flight, self._clock())
        again = [self._ledger.return_ticket(i, cause, redraw=False) for i, cause in useless.items()]
        self._reissue.extend(sorted((*recovery.issued, *again)))
        self._recorder.event(
            "resumed",
            f"at step {self._step} with {len(recovery.ready) - len(again)} tickets from the journal and "
            f"{len(self._reissue)} to sample again, {len(again)} of them because weights that were left sampled them",
        )
        self._recovered.set()
        await self._notify()

    def _useless(self, ready: Sequence[JournalledTicket]) -> dict[int, ReturnCause]:
        """Journalled tickets that are sampled again: too far from the weights that the run goes on from."""
        if self._settings.on_stale == "keep":
            return {}
        outstanding = [Outstanding(t.ticket_id, self._oldest_step(t.versions), True) for t in ready]
        kept = self._settings.admission.trainable(outstanding, self._step)
        return {t.ticket_id: ReturnCause.TOO_STALE for t in ready if t.ticket_id not in kept}

    def _oldest_step(self, versions: Sequence[int]) -> int:
        """The step of the weights that a ticket counts as sampled by, on the branch of the published ones.

        That is the step of its oldest version; for weights of a branch that was left, as many steps before the
        published ones as lie between them along the tree of versions.
        """
        return self._published.step - most_stale(self._versions, versions, self._published.version)

    async def _begin(self) -> None:
        # Tickets are sampled beside the first evaluation, but no new weights are loaded before its end by those that
        # sample for it.
        self._issuing = True
        self._issue()
        if self._evaluator.apart:
            self._may_load.set()
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
            self._launch(member, self._reissue.popleft() if self._reissue else self._draw())
        # Held back: there are free places, and only the learner's progress allows to fill them.
        self._held.set(held and self._pipeline.generation.busy == 0)

    def _draw(self) -> Draw:
        return self._ledger.issue(lambda ticket_id: self._prompts.draw(ticket_id).prompt_id)

    def _launch(self, member: Member, draw: Draw) -> None:
        flight = self._flight(draw, oldest_step=member.step)
        self._flights.add(flight)
        self._spawn(self._carry(flight, member))

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

    async def _carry(self, flight: Flight, member: Member) -> None:
        """Takes one ticket through its stages until it is ready or dropped."""
        ticket_id = flight.ticket.ticket_id
        needed_step = flight.oldest_step
        try:
            receipt = await self._pipeline.sample(flight, member, _at_least(needed_step))
            flight.versions = receipt.versions
            flight.oldest_version, flight.newest_version = receipt.oldest_version, receipt.newest_version
            flight.oldest_step = self._versions[receipt.oldest_version].step
            flight.response_tokens = receipt.response_tokens
            self._flights.sampled(flight, receipt.bytes)
            self._ledger.mark_generated(
                ticket_id,
                versions=receipt.versions,
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
        where = f"ticket {flight.ticket.ticket_id} in {flight.stage}"
        self._recorder.failed_call(flight.stage, f"{where}: {error}")
        if flight.ticket.role == Role.POLICY:
            self._ledger.count_attempt(flight.ticket.ticket_id, flight.stage, str(error))

    # Batches ----------------------------------------------------------------------------------------------------

    async def next_batch(self, step: int) -> BatchGrant | PublishAgain | None:
        """The batch of optimizer step number `step` (the first is 1), as soon as the contract allows it.

        Or the request to publish the newest weights again, where the policy store has lost them; None when the run
        was asked to stop: the learner makes a checkpoint and ends.

        Raises:
            RunError: the run failed, or steps are asked for out of order.
        """
        if step != self._step + 1:
            raise RunError(f"the learner must ask for step {self._step + 1} next, got {step}")
        began = self._learner_waits_since = self._clock()
        if self._turns is not None:
            await self._turns.to_generation()  # a learner that asks has given its memory back
        async with self._changed:
            while not (batch := self._flights.choose(self._step)) and not self._stopping:
                self.check()
                if self._updates.refill_wanted:
                    break
                await self._changed.wait()
        self.check()
        self._learner_waits_since = None
        if (again := self._updates.take_refill()) is not None:
            return again
        if self._stopping:
            return None
        last = max(batch, key=lambda f: f.stage_since_s)
        now = self._clock()
        self._waits.add(blame((began, now), last.timeline))
        self._ledger.record_wait(last.ticket.ticket_id, step, now - began)
        if self._turns is not None:
            await self._turns.to_learner()
        self._step = step
        tickets = [self._grant(flight) for flight in batch]
        self._issue()
        return BatchGrant(step, tuple(tickets))

    def _grant(self, flight: Flight) -> TicketGrant:
        ticket_id = flight.ticket.ticket_id
        # The step before may not be published yet; its weights are what this batch is trained on all the same.
        behind = (self._step - 1) - self._published.step
        age = most_stale(self._versions, flight.versions, self._published.version) + behind
        bound = self._settings.admission.max_staleness
        if self._settings.on_stale == "wait" and age > bound:
            raise LedgerError(
                f"ticket {ticket_id} would be trained with staleness {age}, train.max_staleness is {bound}; "
                "this is a fault of distrl, please report it"
            )
        self._flights.grant(flight)
        return TicketGrant(ticket_id, flight.generation, flight.grading, flight.reference, age)

    @property
    def _published(self) -> Version:
        return self._updates.published

    # Policy versions --------------------------------------------------------------------------------------------

    async def trained(self, report: StepReport, staleness_by_ticket: dict[int, int]) -> int:
        """The learner has done a step. Returns the version number for the weights it made."""
        self.check()
        version = self._ledger.mark_trained(report.step, staleness_by_ticket, self._published.version)
        trained = self._flights.trained(report.step, staleness_by_ticket)
        rewards, tokens = [f.reward_mean for f in trained], sum(f.response_tokens for f in trained)
        if report.skipped is not None:
            self._recorder.event("skipped_step", report.skipped)
        self._recorder.step(report, rewards, list(staleness_by_ticket.values()), tokens)
        return self._updates.expect(version)

    async def restored(self, step: int) -> int:
        """The learner holds the last checkpoint's weights; the version number to publish them under again."""
        # Until the ledger's tickets are taken up, none may be issued: they could not be told apart.
        async with self._changed:
            while not self._recovered.is_set():
                self.check()
                await self._changed.wait()
        if step != self._step:
            raise RunError(f"the learner must go on from step {self._step}, the ledger's last checkpoint, got {step}")
        return self._updates.expect(self._ledger.allocate_version(self._published.version, step))

    async def published(self, version: int, step: int, manifest_sha256: str, weights: str = POLICY_WEIGHTS) -> None:
        """The weights of `version` are in the policy store; generation actors are told to pull them.

        Args:
            weights: whose; an opponent's version is that of the policy at which it was made.
        """
        if weights != POLICY_WEIGHTS:
            self._opponents.arrived(Version(version, None, step))
            await self._notify()
            return
        made = Version(version, self._published.version, step)
        if not self._updates.arrived(made):
            await self._notify()
            return
        self._ledger.mark_published(version, manifest_sha256)
        self._versions[version] = made
        self._flights.release()
        every = self._settings.evaluate_every_steps
        if self._resumed:
            self._resumed, self._issuing = False, not self._stopping
            self._may_load.set()
            self._evaluator.may_load.set()
        if step == self._settings.steps:
            self._spawn(self._finish())
        elif every and step % every == 0:
            # Synchronous training waits for the evaluation: otherwise its responses would depend on timing.
            shared = not self._evaluator.apart
            self._issuing = self._issuing and (not shared or self._settings.admission.max_staleness > 0)
            self._spawn(self._evaluate_during())
        await self._notify()
        self._issue()

    async def commit_checkpoint(self, path: str, step: int, version: int, sha256: str) -> None:
        """A checkpoint is complete on disk: its tickets are committed with it."""
        tickets = self._ledger.commit_checkpoint(path, step=step, version=version, sha256=sha256)
        if self._turns is not None and step == self._settings.steps:
            await self._turns.to_generation()  # for the last evaluation; the learner has nothing left to do
        self._recorder.event("checkpoint", f"step {step}, {tickets} tickets committed: {path}")
        # The ledger gives a checkpoint up before its files go: a crash between the two leaves files, not a gap.
        for old in self._ledger.remove_checkpoints(self._settings.keep_checkpoints):
            try:
                await asyncio.to_thread(shutil.rmtree, old.path)
            except OSError as error:
                self._recorder.failed_call("checkpoint", f"removing the checkpoint {old.path}: {error}")
            else:
                self._recorder.event("checkpoint", f"step {old.step} removed: {old.path}", removed=True)

    # Evaluation -------------------------------------------------------------------------------------------------

    async def _evaluate_during(self) -> None:
        await self._evaluate("during", self._prompts.heldout_during)
        self._issuing = not self._stopping
        self._issue()

    async def _evaluate(self, name: str, problems: Sequence[Problem]) -> None:
        result: Evaluation = await self._evaluator.run(name, problems, self._published.step)
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
            "members": [member.report(pool.stage) for pool in pools for member in pool.members],
            "truncated": self._pipeline.truncated,
            "generated_tokens": self._pipeline.generated_tokens,
        }

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _at_least(step: int) -> Callable[[Member], bool]:
    """Members whose weights have done `step` optimizer steps."""
    return lambda member: member.step >= step
