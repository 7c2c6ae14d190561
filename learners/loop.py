"""The training loop: take a batch, step, publish, checkpoint. Knows neither Ray nor how batches come about."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from torch import Tensor

from distrl.errors import RunError
from distrl.logps import logps_and_entropy, response_logps
from distrl.manifest import describe
from distrl.messages import Manifest, PublishAgain, StepReport
from distrl.objectives import Batch, Recipe, combine, evaluate, prepare
from distrl.weights import policy_tensors
from learners.batches import TrainingBatch, micro_batches, training_batch
from learners.checkpoint import TrainState, load_checkpoint, save_checkpoint
from learners.logp_check import LogpCheck, LogpCheckSettings
from learners.optimizer import OptimizerSettings, clip_gradient, learning_rate, make_optimizer

Stages = tuple[pa.RecordBatch, pa.RecordBatch, pa.RecordBatch | None]
"""A ticket's generation, grading and reference columns."""


class RunLink(Protocol):
    """What the loop asks of the rest of the run; every call has a deadline."""

    def next_batch(self, step: int) -> tuple[Sequence[Stages], Mapping[int, int]] | PublishAgain | None:
        """The tickets of a step, in order, and the staleness of each by ticket id; None to stop.

        While the loop waits here its weights are those that it published last, so it may be asked for them again.
        """
        ...

    def trained(self, report: StepReport, staleness: Mapping[int, int]) -> int:
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

    def commit_checkpoint(self, path: Path, state: TrainState, sha256: str) -> None:
        """A checkpoint is complete; its tickets are committed with it."""
        ...


@dataclass(frozen=True, slots=True)
class World:
    """Which worker of how many this is."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """The part of the config that the loop reads; see there for units."""

    steps: int
    temperature: float
    micro_batch_tokens: int
    checkpoint_every_steps: int
    checkpoints: Path
    optimizer: OptimizerSettings
    logp_check: LogpCheckSettings


class Trainer:
    """One worker's model, optimizer and objective.

    Args:
        model: a Hugging Face causal language model, on its device; trained in place.
        tokenizer: of the model; saved with each checkpoint, gives the padding token.
    """

    def __init__(self, model: Any, tokenizer: Any, recipe: Recipe, settings: LoopSettings) -> None:
        self._model = model.train()
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._settings = settings
        self.optimizer = make_optimizer(model, settings.optimizer)
        self._check = LogpCheck(model, settings.logp_check)

    def step(self, batch: TrainingBatch, step: int) -> dict[str, float]:
        """One optimizer step on a global batch; `step` is its number, the first is 1.

        Returns:
            Metrics of the objective, with the gradient's norm before clipping, the mean entropy of the policy at a
            response token (nats) and the learning rate.
        Raises:
            RunError: the gradient is not finite; the weights are unchanged.
        """
        parts = micro_batches(batch.tokens, batch.tensors["group"], self._settings.micro_batch_tokens)
        given = batch.tensors
        if "policy" in self._recipe.prepare_needs:
            given = {**given, "logps": self._logps(batch, parts)}
        tensors = Batch.from_tensors(given, recipe=self._recipe.name, step=step - 1)
        plan = prepare(self._recipe, tensors)
        outputs = []
        entropy = 0.0
        for index in parts:
            tokens = batch.tokens.rows(index)
            logps, entropies = logps_and_entropy(self._model, tokens, self._settings.temperature)
            entropy += float(entropies.double().sum())
            output = evaluate(self._recipe, tensors.rows(index, logps), plan.rows(index, logps.shape[1]))
            output.loss.backward()
            outputs.append(output)
        norm = clip_gradient(self._model, self._settings.optimizer.max_grad_norm)
        metrics = {
            **plan.metrics,
            **combine(outputs),
            "grad_norm": norm,
            "entropy": entropy / batch.response_tokens,
        }
        if not torch.isfinite(torch.tensor(norm)):
            self.optimizer.zero_grad()
            raise RunError(
                f"step {step}: the gradient's norm must be finite, got {norm} (loss {metrics['loss']}); the weights "
                "of the step before are unchanged"
            )
        rate = learning_rate(self._settings.optimizer, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {**metrics, "learning_rate": rate}

    def _logps(self, batch: TrainingBatch, parts: Sequence[Tensor]) -> Tensor:
        """[B, T] log-probabilities of the whole batch before the step, without gradient."""
        logps = torch.zeros(batch.tokens.response_mask.shape)
        with torch.no_grad():
            for index in parts:
                rows = response_logps(self._model, batch.tokens.rows(index), self._settings.temperature)
                logps[index, : rows.shape[1]] = rows.cpu()
        return logps

    def training_batch(self, tickets: Sequence[Stages]) -> TrainingBatch:
        return training_batch(tickets, self._tokenizer.pad_token_id or 0)

    def check_logps(self, batch: TrainingBatch, version: int, step: int) -> dict[str, float]:
        """Compares recorded log-probabilities with the model's own, see `learners.logp_check.LogpCheck`."""
        return self._check(batch, version, step)

    def publish(self, link: RunLink, version: int, step: int, *, again: bool = False) -> None:
        tensors = policy_tensors(self._model)
        link.publish(describe(tensors, version=version, step=step), tensors, again=again)
        self._check.published(version)

    def checkpoint(self, link: RunLink, state: TrainState) -> int:
        """Saves and commits a checkpoint; its step."""
        directory = self._settings.checkpoints / f"step-{state.step:06d}"
        digest = save_checkpoint(directory, self._model, self.optimizer, state, self._tokenizer.save_pretrained)
        link.commit_checkpoint(directory, state, digest)
        return state.step

    def restore(self, directory: Path) -> TrainState:
        """Takes weights and optimizer from a checkpoint."""
        return load_checkpoint(directory, self._model, self.optimizer)


def train(
    trainer: Trainer,
    settings: LoopSettings,
    link: RunLink,
    world: World,
    resume: TrainState | None,
    report: Callable[[Mapping[str, float]], None],
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Trains from where `resume` says up to `settings.steps`, or until the run is asked to stop.

    Args:
        resume: what `trainer` was restored to; its weights are published before the first step.
        report: told of every step's metrics; under Ray Train it is what keeps the worker group informed.
        clock: seconds, monotonic.
    Raises:
        RunError: more than one worker, or a step whose gradient is not finite.
    """
    if world.size != 1:
        raise RunError(f"the learner must have 1 worker in this version, got {world.size}")
    done = 0 if resume is None else resume.step
    last_publish_s = 0.0
    saved = done
    version = 0
    if resume is not None:
        version = link.restored(resume)
        trainer.publish(link, version, done)
    for step in range(done + 1, settings.steps + 1):
        began = clock()
        while isinstance(batch := link.next_batch(step), PublishAgain):
            trainer.publish(link, batch.version, batch.step, again=True)
        if batch is None:
            break
        tickets, staleness = batch
        received = clock()
        tensors = trainer.training_batch(tickets)
        checked = trainer.check_logps(tensors, version, step)
        metrics = {**trainer.step(tensors, step), **checked}
        trained = clock()
        version = link.trained(
            StepReport(step, received - began, trained - received, last_publish_s, metrics), staleness
        )
        trainer.publish(link, version, step)
        done = step
        if step % settings.checkpoint_every_steps == 0:
            saved = trainer.checkpoint(link, TrainState(step, version))
        last_publish_s = clock() - trained
        report(metrics)
    if saved < done:
        trainer.checkpoint(link, TrainState(done, version))
