"""Whether the recorded log-probabilities are those of the policy: the learner computes some of them again.

Importance ratios are only as good as the behavior log-probabilities that the engines record. An engine that samples
from other weights than it says, or computes otherwise than the learner, shows here before it shows in the reward.

A token is compared under the weights of the version that it names. The learner has those of the newest version anyway;
of one older version it keeps a copy until a batch with tokens of that version has come.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distrl.errors import RunError
from distrl.policy_model import PolicyModel
from distrl.sampling import UpdateMode
from distrl.weights import copy_policy, policy_tensors
from learners.batches import TrainingBatch


@dataclass(frozen=True, slots=True)
class LogpCheckSettings:
    """See the config for units and meaning."""

    rollouts: int
    bound: float
    max_staleness: int
    update_mode: UpdateMode
    temperature: float


@dataclass(slots=True)
class _Differences:
    """Absolute differences in nats, of one engine."""

    sampled: list[Tensor] = field(default_factory=list)
    """Of tokens that saw keys and values of the version they name alone."""
    mixed: list[Tensor] = field(default_factory=list)
    """Of tokens after an update that kept the cache."""


class LogpCheck:
    """Compares a sample of each batch; knows which weights are in the model because it is told.

    Args:
        policy: the one that is trained. Where it is sharded every worker compares, each the same rollouts.
    """

    def __init__(self, policy: PolicyModel, settings: LogpCheckSettings) -> None:
        self._policy = policy
        self._settings = settings
        self._kept: dict[str, Tensor] = {}
        self._kept_version: int | None = None

    def published(self, version: int) -> None:
        """The model's weights are `version` now; keeps a copy unless one is kept whose tokens may still come."""
        s = self._settings
        if not s.rollouts or not s.max_staleness:
            return  # synchronous: a batch has no tokens but the newest version's
        # Every step publishes one version.
        if self._kept_version is None or self._kept_version < version - s.max_staleness:
            self._kept = {name: tensor.clone() for name, tensor in policy_tensors(self._policy).items()}
            self._kept_version = version

    def __call__(self, batch: TrainingBatch, version: int, step: int) -> dict[str, float]:
        """Compares before the step, while the model's weights are `version`.

        Returns:
            Nothing where no token of a known version is in the batch. Else `logp_mismatch_mean` and `logp_mismatch_max`
            (nats) over `logp_mismatch_tokens`, and the first two for each engine with `.ENGINE` behind the name. After
            an update that kept the cache, tokens come from no single version; their distance from the one they name is
            `kept_cache_distance_mean` and `kept_cache_distance_max`.
        Raises:
            RunError: an engine's mean is above the bound.
        """
        found: dict[str, _Differences] = {}
        for of_version in {version, self._kept_version} - {None}:
            rows = self._sample(batch, of_version)
            if not len(rows):
                continue
            self._compare(batch, rows, of_version, version, found)
            if of_version == self._kept_version:
                self._kept, self._kept_version = {}, None
        metrics = _metrics(found)
        self._refuse(metrics, found, step)
        return metrics

    def _sample(self, batch: TrainingBatch, version: int | None) -> Tensor:
        """Rows with tokens of a version, evenly spaced: a batch is ordered by tickets, which the engines share."""
        rows = ((batch.versions == version) & batch.tensors["mask"]).any(1).nonzero()[:, 0]
        wanted = min(self._settings.rollouts, len(rows))
        return rows[torch.linspace(0, len(rows) - 1, wanted).round().long()] if wanted else rows[:0]

    def _compare(
        self, batch: TrainingBatch, rows: Tensor, of_version: int | None, version: int, found: dict[str, _Differences]
    ) -> None:
        tokens = batch.tokens.rows(rows)
        width = tokens.response_mask.shape[1]
        with torch.no_grad(), nullcontext() if of_version == version else self._old_weights():
            device = self._policy.device
            logps = self._policy(tokens.to(device), self._settings.temperature).logps.cpu()
        versions = batch.versions[rows, :width]
        # What an environment said was sampled by nobody.
        named = (versions == of_version) & batch.tensors["mask"][rows, :width]
        # With a kept cache only the tokens of a rollout's first version are of that version alone.
        first = versions == versions[:, :1]
        pure = named & (first if self._settings.update_mode == "keep" else named)
        difference = (logps - batch.tensors["behavior_logps"][rows, :width]).abs().double()
        for i, row in enumerate(rows.tolist()):
            engine = found.setdefault(batch.engines[row], _Differences())
            engine.sampled.append(difference[i][pure[i]])
            engine.mixed.append(difference[i][named[i] & ~pure[i]])

    @contextmanager
    def _old_weights(self) -> Iterator[None]:
        """Puts the kept weights into the model, in place: shards stay where they are."""
        own = policy_tensors(self._policy)
        newest = {name: tensor.clone() for name, tensor in own.items()}
        copy_policy(own, self._kept)
        try:
            yield
        finally:
            copy_policy(own, newest)

    def _refuse(self, metrics: Mapping[str, float], found: Mapping[str, _Differences], step: int) -> None:
        for engine, differences in found.items():
            mean = metrics.get(f"logp_mismatch_mean.{engine}", 0.0)
            if not mean <= self._settings.bound:
                tokens = sum(len(part) for part in differences.sampled)
                raise RunError(
                    f"step {step}: recorded log-probabilities must be within train.logp_mismatch_bound = "
                    f"{self._settings.bound:g} nats of the learner's under the same weights on average, got {mean:.4g} "
                    f"(largest {metrics[f'logp_mismatch_max.{engine}']:.4g}) over {tokens} tokens of {engine}; it "
                    "samples from other weights than it says or computes otherwise: compare its model, dtype and "
                    "engine arguments, or raise the bound"
                )


def _metrics(found: Mapping[str, _Differences]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, parts in (("logp_mismatch", "sampled"), ("kept_cache_distance", "mixed")):
        by_engine = {engine: torch.cat(getattr(found[engine], parts)) for engine in sorted(found)}
        every = torch.cat(list(by_engine.values())) if by_engine else torch.empty(0)
        if not len(every):
            continue
        metrics |= {f"{name}_mean": float(every.mean()), f"{name}_max": float(every.max())}
        metrics[f"{name}_tokens"] = float(len(every))
        if name == "logp_mismatch":
            for engine, values in by_engine.items():
                if len(values):
                    metrics[f"{name}_mean.{engine}"] = float(values.mean())
                    metrics[f"{name}_max.{engine}"] = float(values.max())
    return metrics
