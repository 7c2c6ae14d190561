"""The training loop: take a batch, step, publish, checkpoint. Knows neither Ray nor how batches come about."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from distrl.manifest import describe
from distrl.messages import Manifest, PublishAgain, StepReport
from learners.checkpoint import TrainState, Written
from learners.publication import Job, Publication
from learners.trainer import OPPONENT, LoopSettings, Stages, Trainer
from learners.world import World


class RunLink(Protocol):
    """What the first worker's loop asks of the rest of the run; every call has a deadline."""

    def next_batch(
        self, step: int, check: Callable[[], None]
    ) -> tuple[Sequence[Stages], Mapping[int, int | None]] | PublishAgain | None:
        """The tickets of a step, in order, and the staleness of each by ticket id, None for one that is replayed; None
        to stop.

        While the loop waits here its weights are those that it published last, or is about to, so it may be asked for
        them again.

        Args:
            check: called every now and then meanwhile; what it raises ends the wait.
        """
        ...

    def trained(self, report: StepReport, staleness: Mapping[int, int | None]) -> int:
        """A step is done; the version number for the weights that it made."""
        ...

    def restored(self, state: TrainState) -> int:
        """A checkpoint was loaded; the version number to publish its weights under again."""
        ...

    def publish(self, manifest: Manifest, tensors: Mapping[str, Tensor], *, again: bool = False) -> None:
        """Hands a version to the policy store and tells the run; `tensors` do not change until it returns.

        With `LoopSettings.publish_beside` it is called in a thread of its own, and `next_batch` and
        `commit_checkpoint` may be meanwhile.

        Args:
            again: the version is published, and the store has lost or damaged it.
        """
        ...

    def commit_checkpoint(self, location: str, state: TrainState, sha256: str) -> None:
        """A checkpoint is complete; its tickets are committed with it."""
        ...


def train(
    trainer: Trainer,
    settings: LoopSettings,
    link: RunLink,
    world: World,
    resume: TrainState | None,
    report: Callable[[Mapping[str, float]], None],
    clock: Callable[[], float] = time.perf_counter,
    *,
    republish: bool = True,
) -> None:
    """Trains from where `resume` says up to `settings.steps`, or until the run is asked to stop.

    Every worker of a group runs it, in step with the others. With `publish_beside` a step's weights are published while
    the next one is trained; nothing is told of that one before they are.

    Args:
        link: called by the first worker only; the others get what it was told.
        resume: what `trainer` was restored to.
        republish: publishes its weights before the first step; not where they are the ones that were published last.
        report: told of every step's metrics; under Ray Train it is what keeps the worker group informed.
        clock: seconds, monotonic.
    Raises:
        RunError: the run failed, or too many steps in a row had a gradient that is not finite.
    """
    done = 0 if resume is None else resume.step
    last_publish_s = 0.0
    saved = done
    version = 0
    with Publication(settings.publish_beside) as publication:
        publish = partial(_publish, trainer, link, world, publication, kept=settings.publish_beside)
        if resume is not None and not republish:
            version = resume.version
            trainer.published(version)
        elif resume is not None:
            version = world.from_first(partial(link.restored, resume))
            publish(version, done, restored=True)
        for step in range(done + 1, settings.steps + 1):
            began = clock()
            ask = partial(link.next_batch, step, publication.check)
            while isinstance(batch := world.from_first(ask), PublishAgain):
                publish(batch.version, batch.step, again=True)
            if batch is None:
                break
            tickets, staleness = batch
            received = clock()
            tensors = trainer.training_batch(tickets)
            with trainer.on_device():
                checked = trainer.check_logps(tensors, version, step)
                result = trainer.step(tensors, step)
            done_s = clock()
            publication.wait()  # a version is made from the one that is published
            metrics = {**result.metrics, **checked}
            times = (received - began, done_s - received, last_publish_s)
            told = StepReport(step, *times, metrics, clock() - done_s, result.skipped)
            version = world.from_first(partial(link.trained, told, staleness))
            publish(version, step)
            done = step
            if step % settings.checkpoint_every_steps == 0:
                publication.wait()  # a run goes on from a checkpoint with weights that everybody could have
                _commit(link, world, trainer.finished_checkpoint(wait=True))
                trainer.begin_checkpoint(TrainState(step, version))
                saved = step
            else:
                _commit(link, world, trainer.finished_checkpoint())
            last_publish_s = clock() - done_s
            report(metrics)
    _commit(link, world, trainer.finished_checkpoint(wait=True))
    if saved < done:
        trainer.begin_checkpoint(TrainState(done, version))
        _commit(link, world, trainer.finished_checkpoint(wait=True))


def _publish(
    trainer: Trainer,
    link: RunLink,
    world: World,
    publication: Publication,
    version: int,
    step: int,
    *,
    kept: bool,
    again: bool = False,
    restored: bool = False,
) -> None:
    """Begins to publish the weights of a step, and those of opponents where the objective has some that it changed.

    Args:
        kept: they stay as they are while the next step is trained.
        again: the policy alone, which the store has lost or damaged.
        restored: opponents also where they are unchanged: after a restart nobody has them.
    """
    jobs: list[Job] = []
    anchors = trainer.anchors
    if OPPONENT in anchors.names and not again and (restored or anchors.changed(OPPONENT) == step):
        # First: with the policy's weights the run begins to issue tickets, and these need opponents.
        opponents = trainer.opponent_tensors()
        jobs.append(lambda: link.publish(describe(opponents, version=version, step=step, weights=OPPONENT), opponents))
    tensors = trainer.policy_tensors(kept=kept)
    jobs.append(lambda: link.publish(describe(tensors, version=version, step=step), tensors, again=again))
    if world.first:
        publication.begin(jobs)
    trainer.published(version)


def _commit(link: RunLink, world: World, written: Written | None) -> None:
    if world.first and written is not None:
        link.commit_checkpoint(written.location, written.state, written.sha256)
