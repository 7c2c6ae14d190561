"""The training loop: take a batch, step, publish, checkpoint. Knows neither Ray nor how batches come about."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from distrl.manifest import describe
from distrl.messages import Manifest, PublishAgain, StepReport
from learners.checkpoint import TrainState, Written
from learners.trainer import OPPONENT, LoopSettings, Stages, Trainer
from learners.world import World


class RunLink(Protocol):
    """What the first worker's loop asks of the rest of the run; every call has a deadline."""

    def next_batch(self, step: int) -> tuple[Sequence[Stages], Mapping[int, int | None]] | PublishAgain | None:
        """The tickets of a step, in order, and the staleness of each by ticket id, None for one that is replayed; None
        to stop.

        While the loop waits here its weights are those that it published last, so it may be asked for them again.
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

    Every worker of a group runs it, in step with the others.

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
    if resume is not None and not republish:
        version = resume.version
        trainer.published(version)
    elif resume is not None:
        version = world.from_first(partial(link.restored, resume))
        # First: with the policy's weights the run begins to issue tickets, and these need opponents.
        _publish_opponents(trainer, link, world, version, done, always=True)
        _publish(trainer, link, world, version, done)
    for step in range(done + 1, settings.steps + 1):
        began = clock()
        while isinstance(batch := world.from_first(partial(link.next_batch, step)), PublishAgain):
            _publish(trainer, link, world, batch.version, batch.step, again=True)
        if batch is None:
            break
        tickets, staleness = batch
        received = clock()
        tensors = trainer.training_batch(tickets)
        with trainer.on_device():
            checked = trainer.check_logps(tensors, version, step)
            result = trainer.step(tensors, step)
        done_s = clock()
        metrics = {**result.metrics, **checked}
        told = StepReport(step, received - began, done_s - received, last_publish_s, metrics, result.skipped)
        version = world.from_first(partial(link.trained, told, staleness))
        _publish_opponents(trainer, link, world, version, step)
        _publish(trainer, link, world, version, step)
        done = step
        if step % settings.checkpoint_every_steps == 0:
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


def _publish(trainer: Trainer, link: RunLink, world: World, version: int, step: int, *, again: bool = False) -> None:
    tensors = trainer.policy_tensors()
    if world.first:
        link.publish(describe(tensors, version=version, step=step), tensors, again=again)
    trainer.published(version)


def _publish_opponents(
    trainer: Trainer, link: RunLink, world: World, version: int, step: int, *, always: bool = False
) -> None:
    """Publishes the opponents' weights, where the objective has some and the step has changed them.

    Args:
        always: also where they are unchanged: after a restart nobody has them.
    """
    if OPPONENT not in trainer.anchors.names or not (always or trainer.anchors.changed(OPPONENT) == step):
        return
    tensors = trainer.opponent_tensors()
    if world.first:
        link.publish(describe(tensors, version=version, step=step, weights=OPPONENT), tensors)


def _commit(link: RunLink, world: World, written: Written | None) -> None:
    if world.first and written is not None:
        link.commit_checkpoint(written.location, written.state, written.sha256)
