"""What a recipe is made of, and what evaluating it gives."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from distrl.errors import ConfigError
from distrl.objectives.batch import Batch, check_width, pairs_among
from distrl.objectives.columns import Column
from distrl.objectives.credit import Credit
from distrl.objectives.losses import Loss
from distrl.objectives.quantiles import ratio_quantiles
from distrl.objectives.ratios import Ratio, Weight
from distrl.objectives.regularized import Regularized
from distrl.objectives.schedules import Fixed, Schedule
from distrl.objectives.upkeep import Upkeep

Per = Literal["token", "sequence_mean", "sequence_sum"]


@dataclass(frozen=True, slots=True)
class Term:
    """coefficient * sum(where * weight * loss) / count, the count being that of the global batch."""

    name: str
    """What the term is called in metrics."""
    loss: Loss
    weights: tuple[Weight, ...] = ()
    """Multiplied with each other. A weight of 0 does not change the count."""
    where: Column | None = None
    """Tokens or responses that the term is about; the only thing that changes the count. None: all learnable
    ones."""
    per: Per = "token"
    """token: sum / tokens. sequence_mean: mean over responses of the mean over tokens. sequence_sum: mean
    over responses of the sum over tokens. A loss of pairs is averaged over the pairs, whatever stands
    here."""
    divisor: float = 1.0
    """Divides the term once more, for example by the largest response length (Dr. GRPO)."""
    coefficient: Schedule = field(default_factory=lambda: Fixed(1.0))
    self_normalize: bool = False
    """Divide by the global mean weight, so that weights average 1. `prepare` then reads log-probabilities."""

    def __post_init__(self) -> None:
        if not self.divisor > 0.0:
            raise ConfigError(f"{self.name}.divisor must be > 0, got {self.divisor}; leave it out for 1")

    @property
    def needs(self) -> frozenset[str]:
        """Models and columns that the term reads of the rows it is evaluated on."""
        return self.loss.needs.union(*(weight.needs for weight in self.weights))

    @property
    def ratios(self) -> tuple[Ratio, ...]:
        """The importance ratios that the term is weighted or clipped by."""
        ratios = tuple(weight for weight in self.weights if isinstance(weight, Ratio))
        return (*ratios, self.loss.ratio) if isinstance(self.loss, Regularized) else ratios

    def gate_credit(self, batch: Batch, credit_BT: Tensor) -> Tensor:
        """[B, T] the credit whose sign chooses the side of a taper."""
        return self.loss.regularized_credit(batch, credit_BT) if isinstance(self.loss, Regularized) else credit_BT

    def weight(self, batch: Batch, credit_BT: Tensor) -> Tensor:
        """[B, T] product of the weights, 1 without any, 0 where the mask is False."""
        total = batch.mask.to(batch.dtype)
        for weight in self.weights:
            total = total * weight(batch, credit_BT)
        return total.detach()

    def share(self, batch: Batch) -> Tensor:
        """What the loss of each unit of the global batch is multiplied with, apart from weight and
        coefficient.

        Returns:
            [N] float64, 1 / pairs, for a loss of pairs; else
            [B, T] float64: 1 / tokens for `token`, 1 / (responses * tokens of the response) for
            `sequence_mean`, 1 / responses for `sequence_sum`, 0 where the token does not count. Responses
            without a counted token are not counted.
        """
        if self.loss.unit == "pair":
            pairs = len(batch.columns["pairs"])
            return torch.full((pairs,), 1.0 / max(pairs, 1) / self.divisor, dtype=torch.float64)
        counted = batch.mask
        if self.where is not None:
            chosen = self.where(batch).bool()
            counted = counted & (chosen if chosen.ndim == 2 else chosen[:, None])
        share = counted.double()
        lengths = share.sum(1, keepdim=True)
        if self.per == "token":
            return share / lengths.sum().clamp(min=1) / self.divisor
        if self.per == "sequence_mean":
            share = share / lengths.clamp(min=1)
        return share / (lengths > 0).sum().clamp(min=1) / self.divisor


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named composition of the axes: a credit, and terms that are added."""

    name: str
    source: str
    """Publication with arXiv number and equation."""
    status: Literal["paper", "code", "reconstruction"]
    """Where formula and constants were read; a reconstruction's constants are ours."""
    proves: Literal["policy", "potential", "group"]
    """What its tests prove of its expected gradient: that of the stated objective under the policy, that of
    the taper's potential under the behavior policy, or the enumeration of whole groups."""
    credit: Credit
    terms: tuple[Term, ...]
    summary: str = ""
    """What it does, in a sentence."""
    formula: str = ""
    """What is ascended or descended, in plain text."""
    note: str = ""
    """What in it is ours or differs from its source; never empty for a reconstruction."""
    anchors: Mapping[str, Column] = field(default_factory=dict)
    """Models that are derived from other tensors instead of being run."""
    upkeep: Mapping[str, Upkeep] = field(default_factory=dict)
    """How the system keeps the models that move."""
    options: Mapping[str, float | str] = field(default_factory=dict)
    """The options it was built with, defaults included."""

    @property
    def needs(self) -> frozenset[str]:
        """Models and columns that a run must produce for it; see `required_columns`."""
        terms = frozenset[str]().union(*(term.needs for term in self.terms))
        chosen = frozenset[str]().union(*(term.where.needs for term in self.terms if term.where is not None))
        derived = frozenset[str]().union(*(column.needs for column in self.anchors.values()))
        return ((self.credit.needs | terms | chosen) - self.anchors.keys()) | derived

    @property
    def prepare_needs(self) -> frozenset[str]:
        """Models and columns that `prepare` reads of the whole batch. With "policy" among them a learner has to make a
        forward pass before it, unless proximal log-probabilities are recorded."""
        columns = self.credit.needs
        for term in self.terms:
            columns |= term.where.needs if term.where is not None else frozenset()
            columns |= term.needs if term.self_normalize else frozenset()
            columns |= frozenset({"pairs"}) if term.loss.unit == "pair" else frozenset()
        return columns

    def derive(self, batch: Batch) -> Batch:
        """The batch with the models that are derived instead of run."""
        if not self.anchors:
            return batch
        return replace(batch, models={**batch.models, **{name: make(batch) for name, make in self.anchors.items()}})


@dataclass(frozen=True, slots=True)
class Plan:
    """What one optimizer step knows of the whole global batch. No gradient; rows in the batch's order."""

    credit: Tensor
    """[B, T] float64, 0 where the mask is False."""
    shares: tuple[Tensor, ...]
    """One [B, T] or [N] float64 per term, see `Term.share`; global counts are in it already, so parts are
    simply added."""
    coefficients: tuple[float, ...]
    """One per term."""
    metrics: Mapping[str, float]
    """Metrics of the whole batch that no part could compute."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """[B, T] columns that were made from the whole batch, for losses to read: value_targets, values_old."""
    pairs: Tensor | None = None
    """[N, 2] the pairs of the batch, of which `rows` keeps those among its rows."""

    def rows(self, index: Tensor, width: int | None = None) -> "Plan":
        """The plan of the responses at `index`.

        Args:
            index: [b] row numbers of the global batch.
            width: positions to keep; None keeps all.

        Raises:
            SchemaError: a token that counts lies beyond `width`.
        """
        index = index.to(self.credit.device)
        width = self.credit.shape[1] if width is None else width
        inside, pairs = (None, None) if self.pairs is None else pairs_among(self.pairs, index.to(self.pairs.device))
        shares = []
        for share in self.shares:
            if share.ndim == 1:
                shares.append(share if inside is None else share[inside.to(share.device)])
                continue
            check_width(share[index] > 0, width)
            shares.append(share[index, :width])
        return replace(
            self,
            credit=self.credit[index, :width],
            shares=tuple(shares),
            columns={name: column[index, :width] for name, column in self.columns.items()},
            pairs=pairs,
        )


_MEANS: Mapping[str, tuple[str, str]] = {
    "ratio_mean": ("ratio", "tokens"),
    "kl_behavior": ("log_behavior_over_policy", "tokens"),
    "kl_reference": ("log_policy_over_reference", "tokens_with_reference"),
}


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums and maxima over the rows of one evaluation: what micro-batches and ranks can combine."""

    sums: Mapping[str, float]
    maxima: Mapping[str, float]

    @classmethod
    def merge(cls, parts: Iterable["Totals"]) -> "Totals":
        """Totals of the rows of all parts together. Over ranks: sum the sums, take the largest of the
        maxima."""
        sums: dict[str, float] = {}
        maxima: dict[str, float] = {}
        for part in parts:
            for name, value in part.sums.items():
                sums[name] = sums.get(name, 0.0) + value
            for name, value in part.maxima.items():
                maxima[name] = max(maxima.get(name, value), value)
        return cls(sums, maxima)

    def metrics(self) -> dict[str, float]:
        """The metrics of these rows.

        Returns:
            loss and loss_<term>; ratio_mean, ratio_max and the quantiles ratio_p01, ratio_p50, ratio_p99 over
            tokens of policy / behavior; ess, the effective
            sample size (sum w)^2 / (n sum w^2) of sequence ratios, in (0, 1]; kl_behavior, the mean
            log(behavior / policy) per token, which estimates KL(behavior || policy); kl_reference, the mean
            log(policy / reference) per token; ratio_clamped, how many ratios reached max_log_ratio;
            at_bound_<term>, the fraction of weights that a bound of the taper changed. What could not be
            computed is left out.
        """
        metrics = {name: value for name, value in self.sums.items() if name.split("_")[0] == "loss"}
        for name, (numerator, denominator) in _MEANS.items():
            if self.sums.get(denominator, 0.0) > 0.0:
                metrics[name] = self.sums[numerator] / self.sums[denominator]
        for name in [name for name in self.sums if name.startswith("at_bound_")]:
            weights = self.sums[name.replace("at_bound_", "weights_")]
            metrics[name] = self.sums[name] / weights if weights else 0.0
        if self.sums.get("sequence_ratio_squared", 0.0) > 0.0:
            squared = self.sums["sequences"] * self.sums["sequence_ratio_squared"]
            metrics["ess"] = self.sums["sequence_ratio"] ** 2 / squared
        if "ratio_clamped" in self.sums:
            metrics["ratio_clamped"] = self.sums["ratio_clamped"]
        return metrics | ratio_quantiles(self.sums) | dict(self.maxima)


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What evaluating a recipe on some rows gives."""

    loss: Tensor
    """Scalar with gradient: the rows' part of the global loss. Add the parts; divide by nothing."""
    per_unit: Mapping[str, Tensor]
    """By term, the loss of each token [B, T] or pair [N] before share and coefficient; detached."""
    metrics: Mapping[str, float]
    """Of these rows, and of the whole batch where the plan has them. Not additive: use `combine`."""
    totals: Totals
    """The sums and maxima behind the metrics of these rows."""


def combine(outputs: Iterable[LossOutput]) -> dict[str, float]:
    """The metrics of all rows of several evaluations under one plan, however they were split."""
    parts = list(outputs)
    batch = {name: value for part in parts for name, value in part.metrics.items()}
    return batch | Totals.merge(part.totals for part in parts).metrics()


def stack(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars as floats, with one transfer from the device instead of one each."""
    if not values:
        return {}
    return dict(zip(values, torch.stack([x.detach().double() for x in values.values()]).tolist(), strict=True))
