"""The coordinator: issues tickets, sees them through the stages, forms batches, follows policy versions.

It holds references and small receipts, never rollouts. It is a plain class with asynchronous methods; nothing here
knows whether the stages are actors or objects in the same process.
"""

import asyncio
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from actors.calls import Caller
from actors.crew import Crew
from actors.dispatcher import Dispatcher
from actors.evaluation import Evaluation, Evaluator
from actors.flight import Flight
from actors.keeper import Keeper
from actors.learner_seat import LearnerSeat
from actors.outcome import Outcome
from actors.pipeline import Pipeline
from actors.policy_versions import PolicyVersions
from actors.pool import Member, Pool
from actors.recorder import Recorder
from actors.replays import Replays
from actors.settings import CoordinatorSettings, Prompts
from actors.turns import Turns
from actors.updates import Unversioned, Updates
from actors.waits import Activity, WaitReport, blame
from distrl.errors import LedgerError, RunError
from distrl.ledger import Ledger
from distrl.ledger_reader import Checkpoint
from distrl.messages import BatchGrant, LearnerStart, PublishAgain, StepReport, TicketGrant, Whereabouts
from distrl.schema import Role
from distrl.staleness import Version
from distrl.tasks.problem import Problem
from distrl.tickets import POLICY_WEIGHTS, DropReason, weights_of


class Coordinator:
    """Runs the schedule of one training run.

    Args:
        pipeline: the stages.
        clock: seconds since the epoch.
        keeper: of the checkpoints' files; None deletes those on this machine, and copies no ledger.
        replays: which recorded tickets are replayed; None where `settings.replays_per_step` is 0.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        ledger: Ledger,
        prompts: Prompts,
        pipeline: Pipeline,
        recorder: Recorder,
        clock: Callable[[], float],
        keeper: Keeper | None = None,
        replays: Replays | None = None,
    ) -> None:
        self._settings = settings
        self._keeper = keeper
        self._ledger = ledger
        self._prompts = prompts
        self._pipeline = pipeline
        self._recorder = recorder
        self._clock = clock
        self._evaluator = Evaluator(pipeline, settings.seed, clock)
        self._outcome = Outcome(recorder)
        self._versions = PolicyVersions(ledger)
        self._dispatcher = Dispatcher(
            settings, ledger, prompts, pipeline, self._versions, recorder, self._outcome, clock, replays
        )
        self._updates = Updates(self._versions, pipeline, settings.updates, recorder, self._outcome, clock=clock)
        # No weights of opponents are there before the first publication: engines start from the policy's.
        self._opponent_weights = Unversioned(Version(0, None, 0))
        self._opponents = Updates(
            self._opponent_weights,
            pipeline,
            settings.updates,
            recorder,
            self._outcome,
            weights_of(Role.OPPONENT),
            clock,
        )
        self._may_load = asyncio.Event()
        """Set once the weights may change that sample for training."""
        self._crew = Crew(pipeline)
        self._entering: set[tuple[Updates, Member]] = set()
        """Who is asked for the weights that it holds; until it has answered nobody keeps it at the newest."""
        self._learner = LearnerSeat()
        self._step = ledger.trained_step()  # the last step that was granted
        self._started = self._begun = False
        self._stopping = False
        # After a start on a ledger with a past, and after a roll-back: until the learner is heard of.
        self._resumed = self._versions.has_past
        self._evaluation: asyncio.Task[None] | None = None
        self._waits = WaitReport()
        self._learner_does = Activity(clock)
        self._learner_waits_since: float | None = None
        self._recovered = asyncio.Event()
        self._turns = (
            Turns([pipeline.generation, *pipeline.own_pools.values()], settings.updates.sync_timeout_s)
            if settings.turns
            else None
        )
        self.done = asyncio.Event()
        pipeline.on_loss = lambda member, cause: recorder.event("lost", f"{member.name}: {cause}")

    # The run ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to issue tickets, beside the first evaluation; goes on where an earlier process left a ledger.

        A second call changes nothing.
        """
        if self._started:
            return
        self._started = True
        for pool, updates, may_load in self._followed():
            for member in pool.members:
                if (updates, member) not in self._entering:
                    self._outcome.spawn(updates.follow(pool, member, may_load, self._awake))
        self._outcome.spawn(self._go_on() if self._resumed else self._begin())

    async def join(self, stage: str, caller: Caller, capacity: int) -> None:
        """A process of a stage is there. It gets work; a generation actor loads the newest weights before."""
        member = self._crew.add(stage, caller, capacity)
        if member is None:
            return
        followed = [(pool, updates, may_load) for pool, updates, may_load in self._followed() if member in pool.members]
        self._entering |= {(updates, member) for _, updates, _ in followed}
        for pool, updates, may_load in followed:
            await updates.enter(pool, member, may_load)
            self._entering.remove((updates, member))
            if self._started:
                self._outcome.spawn(updates.follow(pool, member, may_load, self._awake))
        self._recorder.event("joined", caller.name)
        await self._crew.changed()

    @property
    def _awake(self) -> asyncio.Event | None:
        return None if self._turns is None else self._turns.awake

    def _followed(self) -> Iterator[tuple[Pool, Updates, asyncio.Event]]:
        """Pools whose members are kept at the newest weights, with what keeps them, and when they may load."""
        pipeline = self._pipeline
        yield pipeline.generation, self._updates, self._may_load
        if (apart := pipeline.own_pools.get(Role.EVALUATION)) is not None:
            yield apart, self._updates, self._evaluator.may_load
        if self._settings.opponents:
            yield pipeline.pool_of(Role.OPPONENT), self._opponents, self._may_load

    def _policy_pools(self) -> list[Pool]:
        return [pool for pool, updates, _ in self._followed() if updates is self._updates]

    async def leave(self, name: str, cause: str) -> None:
        """A process is gone, or about to be ended; calls that it still has fail and are made again elsewhere."""
        if await self._crew.remove(name):
            self._recorder.event("left", f"{name}: {cause}")
            await self._crew.changed()
            await self._outcome.notify()  # whoever keeps it at the newest weights

    async def drain(self, name: str) -> None:
        """A process gets nothing new; once it is not busy any more it may be ended."""
        self._recorder.event("draining", name)
        self._crew.drain(name)

    async def note(self, kind: str, message: str) -> None:
        """Puts something that was seen elsewhere into the run's records."""
        self._recorder.event(kind, message)

    async def _go_on(self) -> None:
        """Takes up what an earlier process left: ready tickets from the journal, the others are sampled again.

        Tickets are issued again when the learner is heard of: either it lives and goes on, or it was restored to a
        checkpoint and has published its weights again.
        """
        ready, issued = await self._dispatcher.take_up()
        self._recorder.event(
            "resumed", f"after step {self._step} with {ready} tickets from the journal and {issued} to sample again"
        )
        self._recovered.set()
        await self._outcome.notify()
        checkpoint = self._ledger.last_checkpoint()
        if checkpoint is not None and checkpoint.step == self._settings.steps:
            await self._hear_of_learner()  # it has nothing left to do, and may have ended

    async def _begin(self) -> None:
        # Tickets are sampled beside the first evaluation, but no new weights are loaded before its end by those that
        # sample for it.
        self._begun = True
        self._recovered.set()
        self._dispatcher.issuing = not self._stopping
        self._dispatcher.issue()
        await self._outcome.notify()
        if self._evaluator.apart:
            self._may_load.set()
        await self._evaluate("before", self._prompts.heldout)
        self._may_load.set()

    async def _hear_of_learner(self) -> None:
        """The learner lives and holds the newest weights: what a restarted coordinator waits for."""
        if not self._resumed:
            return
        self._resumed = False
        evaluated = {row["name"] for row in self._ledger.evaluations()}
        # Weights of step 0 may have been published again, under another version; they are the same.
        if self._versions.published.step == 0 and "before" not in evaluated and not self._begun:
            self._updates.paused = False
            self._outcome.spawn(self._begin())
            return
        self._may_load.set()
        self._evaluator.may_load.set()
        self._updates.begin_to_load(self._policy_pools())
        self._dispatcher.issuing = not self._stopping
        if self._versions.published.step == self._settings.steps:
            # Also with nothing left to evaluate: the process before may have ended between the evaluation and `done`.
            self._evaluation = self._outcome.spawn(self._finish(evaluated="after" in evaluated))
        await self._outcome.notify()
        self._dispatcher.issue()

    async def _finish(self, *, evaluated: bool = False) -> None:
        self._dispatcher.issuing = False
        if not evaluated:
            await self._evaluate("after", self._prompts.heldout)
        for flight in list(self._dispatcher.flights.under_way.values()):
            self._dispatcher.drop(flight, DropReason.RUN_ENDED, "the run had all the steps it was asked for")
        self._recorder.event("done", "all steps are trained and evaluated")
        self.done.set()
        await self._outcome.notify()

    async def abort(self, reason: str) -> None:
        """Ends the run now: whoever waits for a batch gets a RunError with the reason."""
        await self._outcome.abort(reason)

    async def request_stop(self) -> None:
        """Ends the run after the step under way: issues nothing more, and the learner's next batch is none."""
        if self._stopping:
            return
        self._stopping = True
        self._dispatcher.issuing = False
        self._recorder.event("stopping", "after the step under way")
        await self._outcome.notify()

    # Batches ----------------------------------------------------------------------------------------------------

    async def next_batch(self, step: int, session: int | None = None) -> BatchGrant | PublishAgain | None:
        """The batch of optimizer step number `step` (the first is 1), as soon as the contract allows it.

        Or the request to publish the newest weights again, where the policy store has lost them; None when the run was
        asked to stop or the learner to leave: it makes a checkpoint and ends. Asking for the step again that
        was granted last gives the same tickets: what the first answer referred to may be lost.

        Raises:
            RunError: the run failed, steps are asked for out of order, or another learner process has begun.
        """
        again = step == self._step and bool(self._dispatcher.flights.granted)
        if step != self._step + 1 and not again:
            raise RunError(f"the learner must ask for step {self._step + 1} next, got {step}")
        await self._hear(session)
        if again:
            return await self._grant_again(step)
        if self._turns is not None:
            await self._turns.to_generation()  # a learner that asks has given its memory back
        began = self._learner_waits_since = self._clock()
        self._learner_does.begin(f"waits for the batch of step {step}")
        batch: list[Flight] = []
        async with self._outcome.changed:
            while not self._learner.must_leave(session) and not (batch := self._dispatcher.choose(self._step)):
                self._outcome.check()
                if self._stopping:
                    break
                if self._updates.refill_wanted and self._all_published:
                    break
                await self._outcome.changed.wait()
                self._learner.check(session)
        self._outcome.check()
        self._learner_waits_since = None
        if self._all_published and (refill := self._updates.take_refill()) is not None:
            return refill
        if self._stopping or self._learner.must_leave(session):
            self._learner.left = True
            return None
        last = max(batch, key=lambda f: f.stage_since_s)
        now = self._clock()
        self._waits.add(blame((began, now), last.timeline))
        self._ledger.record_wait(last.ticket.ticket_id, step, now - began)
        if self._turns is not None:
            await self._turns.to_learner()
        self._step = step
        self._learner_does.begin(f"trains step {step} on {len(batch)} tickets")
        tickets = [self._grant(flight) for flight in batch]
        self._dispatcher.issue()
        return BatchGrant(step, tuple(tickets))

    @property
    def _all_published(self) -> bool:
        """Whether the published weights are those that the learner has: it may be publishing newer ones, which do in
        place of those that were lost."""
        return self._versions.published.step == self._step

    async def _grant_again(self, step: int) -> BatchGrant:
        granted = [flight for _, flight in sorted(self._dispatcher.flights.granted.items())]
        await self._dispatcher.refresh(granted)
        return BatchGrant(step, tuple(self._ticket_grant(flight) for flight in granted))

    async def _hear(self, session: int | None) -> None:
        """Every call of a learner that holds weights begins with this."""
        await self._outcome.wait_for(self._recovered)
        self._learner.check(session)
        await self._hear_of_learner()

    def _grant(self, flight: Flight) -> TicketGrant:
        grant = self._ticket_grant(flight)
        bound = self._settings.admission.max_staleness
        if self._settings.on_stale != "keep" and grant.staleness is not None and grant.staleness > bound:
            raise LedgerError(
                f"ticket {grant.ticket_id} would be trained with staleness {grant.staleness}, train.max_staleness is "
                f"{bound}; this is a fault of distrl, please report it"
            )
        self._dispatcher.flights.grant(flight)
        return grant

    def _ticket_grant(self, flight: Flight) -> TicketGrant:
        # The step before may not be published yet; its weights are what this batch is trained on all the same.
        behind = (self._step - 1) - self._versions.published.step
        age = None if flight.ticket.recorded is not None else self._versions.age(flight.versions) + behind
        return TicketGrant(flight.ticket.ticket_id, flight.generation, flight.grading, flight.reference, age)

    # The learner ------------------------------------------------------------------------------------------------

    async def learner_begins(self, where: Whereabouts, workers: Sequence[Whereabouts] = ()) -> LearnerStart:
        """A learner process is there and has no weights yet; what it goes on from.

        Args:
            workers: all processes of its group in the order of their ranks; empty where it is the only one.
        """
        await self._outcome.wait_for(self._recovered)
        began_before = self._learner.starts > 0 or self._versions.has_past
        checkpoint = self._ledger.last_checkpoint()
        lossless = self._learner.left and self._is_saved(checkpoint)
        session = self._learner.sit(where, workers)
        self._learner_does.begin("loads its weights")
        self._updates.expect_nothing()
        await self._outcome.notify()  # a call of the process before may still wait for a batch
        group = f", the first of {len(workers)}," if len(workers) > 1 else ""
        self._recorder.event("learner", f"process {where.pid}{group} on {where.host} begins")
        return LearnerStart(
            session, None if checkpoint is None else checkpoint.path, publish=began_before and not lossless
        )

    def _is_saved(self, checkpoint: Checkpoint | None) -> bool:
        """Whether the published weights are those of the checkpoint, and nothing is in a learner's hands.

        A learner that goes on from it needs no new version, and nothing is trained again.
        """
        version, step = (0, 0) if checkpoint is None else (checkpoint.version, checkpoint.step)
        published = self._versions.published
        return (published.version, published.step, self._step) == (version, step, step) and not (
            self._resumed or self._dispatcher.flights.granted
        )

    async def release_learner(self, session: int) -> None:
        """Asks the learner of this session to leave after the step under way: another group goes on from there."""
        if self._learner.ask_to_leave(session):
            self._recorder.event("learner", "is asked to leave after the step under way")
            await self._outcome.notify()

    async def learner_failed(self, cause: str, session: int | None = None) -> None:
        """The learner cannot go on, and no other process could; one that was replaced says nothing that counts."""
        if session is None or session >= self._learner.session:
            self._outcome.fail(RunError(f"the learner failed: {cause}"))

    async def trained(
        self, report: StepReport, staleness_by_ticket: dict[int, int | None], session: int | None = None
    ) -> int:
        """The learner has done a step. Returns the version number for the weights it made.

        Telling it again changes nothing and gives the same number.
        """
        await self._hear(session)
        version = self._versions.trained(report.step, staleness_by_ticket)
        if self._dispatcher.flights.has(staleness_by_ticket):
            trained = self._dispatcher.flights.trained(report.step, staleness_by_ticket)
            self._step = report.step
            rewards, tokens = [f.reward_mean for f in trained], sum(f.response_tokens for f in trained)
            if report.skipped is not None:
                self._recorder.event("skipped_step", report.skipped)
            self._recorder.step(report, rewards, list(staleness_by_ticket.values()), tokens)
            self._learner_does.begin(_publishes(version))
        return self._updates.expect(version)

    async def restored(self, step: int, session: int | None = None) -> int:
        """The learner holds the last checkpoint's weights; the version number to publish them under again.

        Whatever was trained after the checkpoint is to be trained again, and so is what the learner had in hand.
        """
        await self._outcome.wait_for(self._recovered)
        self._learner.check(session)
        checkpoint = self._ledger.last_checkpoint()
        expected, version = (0, 0) if checkpoint is None else (checkpoint.step, checkpoint.version)
        if step != expected:
            raise RunError(f"the learner must go on from step {expected}, the ledger's last checkpoint, got {step}")
        if self._evaluation is not None:
            self._evaluation.cancel()  # it may wait for weights that are gone; so would synchronous training for it
        self.done.clear()
        self._dispatcher.issuing = False
        self._resumed = True
        self._versions.go_back(version)
        self._updates.pause(self._policy_pools())
        returned = await self._dispatcher.roll_back(step)
        self._step = step
        self._recorder.event("rolled_back", f"to step {step}, {returned} trained tickets are ready again")
        version = self._versions.allocate(step)
        self._learner_does.begin(f"publishes policy version {version} again")
        return self._updates.expect(version)

    async def published(
        self,
        version: int,
        step: int,
        manifest_sha256: str,
        weights: str = POLICY_WEIGHTS,
        session: int | None = None,
    ) -> None:
        """The weights of `version` are in the policy store; generation actors are told to pull them.

        The learner may have the next batch by now; what it trains on it, it tells after this.

        Args:
            weights: whose; an opponent's version is that of the policy at which it was made.
        Raises:
            RunError: another learner process has begun.
        """
        self._learner.check(session)
        if weights != POLICY_WEIGHTS:
            if self._opponents.arrived(version):
                self._opponent_weights.published = Version(version, None, step)
                if self._resumed or self._settings.admission.max_staleness == 0:
                    self._dispatcher.first_opponent = version
            await self._outcome.notify()
            return
        await self._outcome.wait_for(self._recovered)
        publishing = self._updates.report()
        if not self._updates.arrived(version):
            await self._hear_of_learner()
            await self._outcome.notify()
            return
        self._versions.publish(version, manifest_sha256)
        if publishing is not None:  # an earlier process of the coordinator may have been told of the step
            self._recorder.published(version, step, publishing["since_s"])
        self._learner_does.end(
            _publishes(version), f"has published policy version {version} and asks for no batch, or makes a checkpoint"
        )
        self._dispatcher.flights.release()
        every = self._settings.evaluate_every_steps
        if self._resumed and self._settings.opponents and not self._dispatcher.first_opponent:
            raise RunError(
                f"the learner must publish the weights {weights_of(Role.OPPONENT)} of its checkpoint before policy "
                f"version {version}, got none; tickets would meet the model that the run began with"
            )
        if self._resumed:
            await self._hear_of_learner()
        elif step == self._settings.steps:
            self._evaluation = self._outcome.spawn(self._finish())
        elif every and step % every == 0:
            # Synchronous training waits for the evaluation: otherwise its responses would depend on timing.
            shared = not self._evaluator.apart
            issuing = self._dispatcher.issuing
            self._dispatcher.issuing = issuing and (not shared or self._settings.admission.max_staleness > 0)
            self._evaluation = self._outcome.spawn(self._evaluate_during())
        await self._outcome.notify()
        self._dispatcher.issue()

    async def commit_checkpoint(
        self, path: str, step: int, version: int, sha256: str, session: int | None = None
    ) -> None:
        """A checkpoint is complete on disk: its tickets are committed with it. Telling it again changes nothing."""
        await self._hear(session)
        tickets = self._ledger.commit_checkpoint(path, step=step, version=version, sha256=sha256)
        if self._turns is not None and step == self._settings.steps:
            await self._turns.to_generation()  # for the last evaluation; the learner has nothing left to do
        self._recorder.event("checkpoint", f"step {step}, {tickets} tickets committed: {path}")
        remove: Callable[[str], object] = shutil.rmtree
        if self._keeper is not None:
            # Before an older checkpoint goes: of the two kept at least there is always one with a copy of its own.
            await asyncio.to_thread(self._keeper.copy_ledger, path)
            remove = self._keeper.remove
        # The ledger gives a checkpoint up before its files go: a crash between the two leaves files, not a gap.
        for old in self._ledger.remove_checkpoints(self._settings.keep_checkpoints):
            try:
                await asyncio.to_thread(remove, old.path)
            except OSError as error:
                self._recorder.failed_call("checkpoint", f"removing the checkpoint {old.path}: {error}")
            else:
                self._recorder.event("checkpoint", f"step {old.step} removed: {old.path}", removed=True)

    # Evaluation -------------------------------------------------------------------------------------------------

    async def _evaluate_during(self) -> None:
        await self._evaluate("during", self._prompts.heldout_during)
        self._dispatcher.issuing = not self._stopping
        self._dispatcher.issue()

    async def _evaluate(self, name: str, problems: Sequence[Problem]) -> None:
        if not problems:
            return  # a run that only replays may have nobody to sample
        result: Evaluation = await self._evaluator.run(name, problems, self._versions.published.step)
        self._ledger.record_evaluation(result.row())
        self._recorder.evaluation(result.row())

    # Reports ----------------------------------------------------------------------------------------------------

    async def snapshot(self, after: int) -> dict[str, Any]:
        """What the driver shows: records with a number above `after`, tickets by state, who waits for whom."""
        fatal = self._outcome.fatal
        return {
            "records": self._recorder.after(after),
            "done": self.done.is_set(),
            "stopping": self._stopping,
            "failed": None if fatal is None else f"{type(fatal).__name__}: {fatal}",
            "step": self._versions.published.step,
            **self._dispatcher.flights.report(self._clock()),
            "rollouts": dict(self._pipeline.rollouts),
            "learner_waiting": self._learner_waits_since is not None,
            "generation_held": self._dispatcher.held.running,
            "tickets": self._ledger.counts(),
            "drops": self._ledger.drops(),
            "max_staleness": self._ledger.max_staleness(),
            "learner_waits_s": dict(self._waits.learner_s),
            "generation_held_s": self._dispatcher.held.read(),
            **self._crew.report(),
            "evaluating": self._evaluator.report(self._clock()),
            "truncated": self._pipeline.truncated,
            "generated_tokens": self._pipeline.generated_tokens,
            "retries": dict(self._pipeline.retries),
            "learner": {**self._learner.report(), **self._learner_does.report()},
            "publishing": self._updates.report(),
            "started": self._started,
            "resumed": self._versions.has_past,
        }


def _publishes(version: int) -> str:
    return f"publishes policy version {version}"
