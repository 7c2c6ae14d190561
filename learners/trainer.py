"""One worker's part of an optimizer step."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from distrl.errors import RunError
from distrl.lora import Publish
from distrl.objectives import Batch, LossOutput, Plan, Recipe, Totals, evaluate, prepare
from distrl.objectives.batch import tensor_name
from distrl.policy_model import Layout, PolicyModel
from distrl.schema import Role
from distrl.storage import Folder
from distrl.tickets import weights_of
from learners.anchors import Anchors
from learners.batches import Budget, TrainingBatch, split, training_batch
from learners.checkpoint import CheckpointWriter, TrainState, Written, checkpoint_name, load_checkpoint
from learners.gathering import whole_adapters, whole_tensors
from learners.logp_check import LogpCheck, LogpCheckSettings
from learners.optimizer import OptimizerSettings, clip_gradient, learning_rate, make_optimizer
from learners.parallel import ParallelSettings, accumulating, parallelize, prepare_model
from learners.turns import on_device
from learners.world import World

OPPONENT = weights_of(Role.OPPONENT)

Stages = tuple[pa.RecordBatch, pa.RecordBatch, pa.RecordBatch | None]
"""A ticket's generation, grading and reference columns."""


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """The part of the config that the loop reads; see there for units."""

    steps: int
    temperature: float
    micro_batch_tokens: int
    checkpoint_every_steps: int
    checkpoints: Path
    """Directory where they are made."""
    optimizer: OptimizerSettings
    logp_check: LogpCheckSettings
    layout: Layout = "bucketed"
    parallel: ParallelSettings = ParallelSettings()  # noqa: RUF009  (frozen)
    skipped_in_a_row: int = 3
    publish: Publish = "merged"
    publish_beside: bool = False
    """Whether the next step is trained while weights are published; it cannot be where it waits for them."""
    takes_turns: bool = False
    """Is on its device only where `Trainer.on_device` says."""
    storage: Folder | None = None
    """Where checkpoints are sent from there; None leaves them."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an optimizer step did."""

    metrics: Mapping[str, float]
    skipped: str | None = None
    """Why the weights were left as they were; names the tickets."""


class Trainer:
    """A worker's model, optimizer and objective.

    Args:
        model: a Hugging Face causal language model with float32 parameters, on the worker's device or, with
            `takes_turns`, on the CPU, the same in every worker; trained in place.
        tokenizer: of the model; saved with each checkpoint, gives the padding token.
        world: the worker's place in its group.
    Raises:
        ConfigError: the model cannot be trained as the settings say.
    """

    def __init__(
        self, model: Any, tokenizer: Any, recipe: Recipe, settings: LoopSettings, world: World | None = None
    ) -> None:
        self._world = world or World()
        self._model = model
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._settings = settings
        precision = settings.parallel.dtype
        # Shards are gathered in the lower precision; whole parameters are rounded where they are used.
        rounds = precision != torch.float32 and settings.parallel.parallel == "ddp"
        prepare_model(model, settings.parallel)
        self.policy = PolicyModel(
            model,
            value_head="values" in recipe.needs,
            layout=settings.layout,
            autocast=precision if rounds else None,
        )
        self._module = parallelize(self.policy, self._world, settings.parallel)
        self.optimizer = make_optimizer(self.policy, settings.optimizer)
        self.anchors = Anchors(self.policy, recipe.upkeep, self.optimizer)
        self._writer = CheckpointWriter(self._world, tokenizer.save_pretrained, settings.storage)
        self._check = LogpCheck(self.policy, settings.logp_check)
        self._skipped = 0

    # Steps --------------------------------------------------------------------------------------------------------

    def on_device(self) -> AbstractContextManager[None]:
        """Steps and checks of log-probabilities go inside: a learner that takes turns is on its device only there."""
        if not self._settings.takes_turns:
            return nullcontext()
        return on_device(self._world.device, self.policy, self.optimizer, self.anchors)

    def step(self, batch: TrainingBatch, step: int) -> StepResult:
        """One optimizer step on a global batch, which every worker gets; `step` is its number, the first is 1.

        Where the gradient is not finite the weights stay as they are.

        Returns:
            Metrics of the objective over the global batch, with the gradient's norm before clipping, the mean entropy
            of the policy at a response token (nats) and the learning rate.
        Raises:
            RunError: a response does not fit into a micro-batch, or too many steps in a row were skipped.
        """
        parts = self._split(batch)
        plan, tensors = self._prepare(batch, parts, step)
        outputs: list[LossOutput] = []
        entropy = 0.0
        suspects: set[int] = set()
        for number, index in enumerate(parts):
            with accumulating(self._module, last=number == len(parts) - 1):
                output, entropies, bad = self._backward(batch, tensors, plan, index)
            if output is not None:
                outputs.append(output)
                entropy += entropies
                suspects |= bad
        norm = clip_gradient(self.policy, self._settings.optimizer.max_grad_norm)
        metrics = self._metrics(outputs, plan, entropy, batch, norm)
        if not torch.isfinite(torch.tensor(norm)):
            return self._skip(step, norm, metrics, suspects, batch)
        self._skipped = 0
        rate = learning_rate(self._settings.optimizer, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.anchors.after_step(step)
        return StepResult({**metrics, "learning_rate": rate})

    def training_batch(self, tickets: Sequence[Stages]) -> TrainingBatch:
        return training_batch(tickets, self._tokenizer.pad_token_id or 0)

    def check_logps(self, batch: TrainingBatch, version: int, step: int) -> dict[str, float]:
        """Compares recorded log-probabilities with the model's own, see `learners.logp_check.LogpCheck`."""
        return self._check(batch, version, step)

    def published(self, version: int) -> None:
        """The weights of the model are `version` now, for `check_logps`."""
        self._check.published(version)

    def _split(self, batch: TrainingBatch) -> list[Tensor]:
        settings = self._settings
        whole = any(term.loss.unit == "pair" for term in self._recipe.terms)
        budget = Budget(settings.micro_batch_tokens, settings.layout == "packed", whole)
        shares = split(batch.tokens.lengths, batch.tensors["group"], budget, self._world.size)
        return shares[self._world.rank]

    def _prepare(self, batch: TrainingBatch, parts: Sequence[Tensor], step: int) -> tuple[Plan, Batch]:
        """What is made of the whole batch before the step, the same in every worker."""
        given = dict(batch.tensors)
        recipe = self._recipe
        if "policy" in recipe.prepare_needs or {"values", "proximal"} & recipe.needs:
            logps, values = self._before_the_step(batch, parts)
            given["logps"] = logps
            if "proximal" in recipe.needs:
                given["proximal_logps"] = logps
            if values is not None:
                given["values"] = values
        for name in sorted(self.anchors.names & recipe.needs):
            with self.anchors.in_place_of_the_policy(name):
                given[tensor_name(name)], _ = self._before_the_step(batch, parts)
        tensors = Batch.from_tensors(given, recipe=recipe.name, step=step - 1)
        return prepare(recipe, tensors), tensors

    def _before_the_step(self, batch: TrainingBatch, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """[B, T] log-probabilities and values of the whole batch, without gradient."""
        shape = batch.tokens.response_mask.shape
        logps, values = torch.zeros(shape), torch.zeros(shape)
        with torch.no_grad():
            for index in parts:
                rows = index if len(index) else torch.zeros(1, dtype=torch.int64)
                scores = self._module(batch.tokens.rows(rows).to(self._world.device), self._settings.temperature)
                if len(index):
                    width = scores.logps.shape[1]
                    logps, values = logps.to(scores.logps.dtype), values.to(scores.logps.dtype)
                    logps[index, :width] = scores.logps.cpu()
                    if scores.values is not None:
                        values[index, :width] = scores.values.cpu()
        # Each row is another worker's, so that sums are the numbers themselves.
        known = self._world.sum_(logps), self._world.sum_(values)
        return known[0], known[1] if self.policy.value_head is not None else None

    def _backward(
        self, batch: TrainingBatch, tensors: Batch, plan: Plan, index: Tensor
    ) -> tuple[LossOutput | None, float, set[int]]:
        """Adds the gradient of some rows; their output, summed entropy, and tickets whose loss is not finite."""
        empty = not len(index)
        rows = torch.zeros(1, dtype=torch.int64) if empty else index
        tokens = batch.tokens.rows(rows).to(self._world.device)
        logps, entropies, values = self._module(tokens, self._settings.temperature)
        if empty:
            # The other workers are in this pass, too, and wait for this one.
            nothing = logps.sum() * 0.0 if values is None else (logps.sum() + values.sum()) * 0.0
            nothing.backward()
            return None, 0.0, set()
        fresh = None if values is None else {"values": values}
        part = tensors.rows(index, logps, fresh)
        output = evaluate(self._recipe, part, plan.rows(index, logps.shape[1]))
        # Workers' gradients are averaged, and the losses are parts of one sum.
        (output.loss * self._world.size).backward()
        bad = ~torch.isfinite(logps.detach()).all(1).cpu()
        for unit in output.per_unit.values():
            if unit.ndim == 2:
                bad |= ~torch.isfinite(unit).all(1).cpu()
        # Of what was sampled: what an environment said is no choice of the policy's.
        sampled = batch.tensors["mask"][index][:, : logps.shape[1]].to(entropies.device)
        return output, float(entropies.double()[sampled].sum()), set(batch.tensors["group"][index][bad].tolist())

    def _metrics(
        self, outputs: Sequence[LossOutput], plan: Plan, entropy: float, batch: TrainingBatch, norm: float
    ) -> dict[str, float]:
        own = (Totals.merge(output.totals for output in outputs), entropy)
        everyone = self._world.gather(own)
        totals = Totals.merge(part for part, _ in everyone)
        return {
            **plan.metrics,
            **totals.metrics(),
            "grad_norm": norm,
            "entropy": sum(part for _, part in everyone) / int(batch.tensors["mask"].sum()),
        }

    def _skip(
        self, step: int, norm: float, metrics: Mapping[str, float], suspects: set[int], batch: TrainingBatch
    ) -> StepResult:
        self.optimizer.zero_grad()
        self._skipped += 1
        found = sorted(set().union(*self._world.gather(suspects)))
        tickets = found or sorted(set(batch.tensors["group"].tolist()))
        what = (
            "the loss of these tickets is" if found else "no ticket's loss is, only the gradient of the whole batch is"
        )
        cause = (
            f"step {step}: the gradient's norm must be finite, got {norm} (loss {metrics['loss']}); {what} not finite: "
            f"{', '.join(map(str, tickets))}; the weights of the step before are unchanged"
        )
        if self._skipped > self._settings.skipped_in_a_row:
            raise RunError(
                f"limits.skipped_steps_in_a_row: at most {self._settings.skipped_in_a_row} steps may be skipped in a "
                f"row, got {self._skipped}; {cause}"
            )
        return StepResult({k: v for k, v in metrics.items() if _finite(v)}, cause)

    # Weights ------------------------------------------------------------------------------------------------------

    def policy_tensors(self, *, kept: bool = False) -> dict[str, Tensor]:
        """The weights to publish, or their adapters, whole, on the first worker; every worker calls it.

        Args:
            kept: copies in main memory, which stay as they are while the model is trained.
        """
        gathered = whole_adapters if self._settings.publish == "adapter" else whole_tensors
        return gathered(self._model, self._world.first, kept=kept)

    def opponent_tensors(self) -> dict[str, Tensor]:
        """The opponents' weights, as `policy_tensors`, kept."""
        with self.anchors.in_place_of_the_policy(OPPONENT):
            return self.policy_tensors(kept=True)

    def begin_checkpoint(self, state: TrainState) -> None:
        """Starts to write a checkpoint; see `CheckpointWriter.begin`."""
        directory = self._settings.checkpoints / checkpoint_name(state)
        self._writer.begin(directory, self._model, self.policy, self.optimizer, state, self.anchors.tensors())

    def finished_checkpoint(self, wait: bool = False) -> Written | None:
        return self._writer.finished(wait)

    def restore(self, directory: Path) -> TrainState:
        """Takes weights and optimizer from a checkpoint that any number of workers wrote."""
        return load_checkpoint(directory, self.policy, self.optimizer, self._world, self.anchors.tensors())


def _finite(value: float) -> bool:
    return value - value == 0.0
