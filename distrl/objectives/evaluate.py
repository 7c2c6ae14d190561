"""Evaluate a recipe: once per step on the whole batch (`prepare`), then on any part of it (`evaluate`)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distrl.errors import ConfigError, SchemaError
from distrl.objectives.batch import Batch
from distrl.objectives.build import build
from distrl.objectives.credit import Constant, GroupMean
from distrl.objectives.losses import Score
from distrl.objectives.ratios import Ratio
from distrl.objectives.recipe import LossOutput, Plan, Recipe, Term, Totals, stack
from distrl.objectives.tapers import SignedTruncate


def required_columns(recipe: Recipe) -> frozenset[str]:
    """What a run must produce for a recipe.

    Returns:
        Column names ("rewards", "group") and model names ("policy", "behavior", "reference", "proximal").
        With "reference" in it, every response must be scored by the reference model.
    """
    return recipe.needs


def check(
    recipe: Recipe,
    *,
    lowest_reward: float | None = None,
    group_size: int | None = None,
    produced: frozenset[str] | None = None,
) -> None:
    """Refuse a combination that would train something else than it says, before anything runs.

    Args:
        lowest_reward: smallest reward that the graders can give; None where it is unbounded or unknown.
        group_size: responses per ticket.
        produced: models and columns that the run produces, as in `required_columns`.

    Raises:
        ConfigError: no credit could be negative under a taper that gives credits >= 0 a constant weight,
            which is supervised training on good responses; groups of one under a group baseline, whose
            credit is always 0; or something that the recipe reads is not produced.
    """
    baseline = recipe.credit.baseline
    if lowest_reward is not None and isinstance(baseline, Constant) and baseline.value <= lowest_reward:
        for ratio in (weight for term in recipe.terms for weight in term.weights if isinstance(weight, Ratio)):
            shape = ratio.shape
            if isinstance(shape, SignedTruncate) and shape.a_plus == shape.b_plus:
                raise ConfigError(
                    f"{recipe.name}.baseline must be > the lowest reward {lowest_reward}, "
                    f"got {baseline.value}; "
                    "else no response is pushed down (supervised training on the others): "
                    "use 0.5 for rewards in {0, 1}, or rewards in {-1, 1} with baseline 0"
                )
    if group_size is not None and isinstance(baseline, GroupMean) and group_size < baseline.smallest_group:
        raise ConfigError(
            f"{recipe.name} needs a group size >= {baseline.smallest_group}, got {group_size}; "
            "a response alone in its group is its own mean and has credit 0: sample more responses per prompt"
        )
    missing = sorted(recipe.needs - produced) if produced is not None else []
    if missing:
        raise ConfigError(
            f"{recipe.name} reads {', '.join(missing)}, which this run does not produce; "
            "turn on what produces it, or the option off that reads it (kl_coefficient: 0 for the reference)"
        )


def prepare(recipe: Recipe, batch: Batch, last_metrics: Mapping[str, float] | None = None) -> Plan:
    """What one optimizer step needs to know of the whole global batch: credits, counts, coefficients.

    Log-probabilities are read only by self-normalized terms: those under the proximal policy, or the current
    ones, detached, where none are recorded. Every other recipe needs no forward pass before this.

    Args:
        batch: every response of the step, over all micro-batches and ranks.
        last_metrics: metrics of the step before, for schedules that control something.

    Raises:
        SchemaError: a tensor is missing or has the wrong shape.
    """
    batch.check(recipe.name)
    columns = recipe.credit.needs
    for term in recipe.terms:
        columns |= term.where.needs if term.where is not None else frozenset()
        columns |= term.needs if term.self_normalize else frozenset()
    batch = batch.at_proximal()
    batch.require(recipe.name, columns)
    credit_BT, credit_B = recipe.credit(batch)
    shares = []
    for term in recipe.terms:
        share = term.share(batch)
        if term.self_normalize:
            share = share / _mean_weight(term, batch, credit_BT, share > 0)
        shares.append(share)
    coefficients = tuple(term.coefficient(batch.step, last_metrics or {}) for term in recipe.terms)
    total = credit_B.abs().sum()
    metrics = {
        "credit_mean": credit_B.mean(),
        "credit_zero": (credit_B == 0).double().mean(),
        "effective_positives": credit_B.clamp(min=0).sum() / torch.where(total > 0, total, 1.0),
    }
    return Plan(credit_BT, tuple(shares), coefficients, stack(metrics))


def evaluate(recipe: Recipe, rows: Batch, plan: Plan) -> LossOutput:
    """The part of the global loss that some rows contribute.

    Args:
        rows: any whole groups of the batch that was prepared, in any order and split, with fresh
        log-probabilities. plan: `plan.rows(index)` for the same rows; it may lie on another device.

    Returns:
        Losses of parts add up to the loss of the whole, and so do their gradients.

    Raises:
        SchemaError: a tensor is missing or has the wrong shape, or the plan is of other rows.
    """
    rows.check(recipe.name)
    rows.require(recipe.name, frozenset({"policy"}).union(*(term.needs for term in recipe.terms)))
    if plan.credit.shape != rows.mask.shape:
        raise SchemaError(
            f"{recipe.name} needs a plan of the same rows, of shape {list(rows.mask.shape)} like the mask, "
            f"got {list(plan.credit.shape)}; pass plan.rows(index, width) with the index of batch.rows"
        )
    credit = plan.credit.to(rows.mask.device, rows.dtype)
    loss: Tensor | float = 0.0
    per_unit: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    for term, share, coefficient in zip(recipe.terms, plan.shares, plan.coefficients, strict=True):
        unit = _unit_losses(term, rows, credit)
        part = coefficient * (share.to(unit.device, unit.dtype) * unit).sum()
        loss = loss + part
        per_unit[term.name] = unit.detach()
        sums[f"loss_{term.name}"] = part
    total = torch.as_tensor(loss)
    totals = _totals(recipe, rows, credit, {"loss": total, **sums})
    return LossOutput(total, per_unit, {**plan.metrics, **totals.metrics()}, totals)


def compute(recipe: str | Recipe, tensors: Mapping[str, Tensor], *, step: int = 0) -> LossOutput:
    """`prepare`, then `evaluate`, on a batch that is used whole.

    Args:
        recipe: a recipe, or the name of one with its default options.
        tensors: see `Batch.from_tensors`.
        step: optimizer steps done before this one.

    Raises:
        ConfigError: there is no recipe of that name.
        SchemaError: a tensor is missing or has the wrong shape.
    """
    chosen = build(recipe) if isinstance(recipe, str) else recipe
    batch = Batch.from_tensors(tensors, recipe=chosen.name, step=step)
    return evaluate(chosen, batch, prepare(chosen, batch))


def _unit_losses(term: Term, rows: Batch, credit_BT: Tensor) -> Tensor:
    """[B, T] losses, whose value is the potential where the gradient is that of one."""
    unit = term.loss(rows, credit_BT, term.weight(rows, credit_BT))
    ratio = term.weights[0] if len(term.weights) == 1 else None
    if not isinstance(term.loss, Score) or not isinstance(ratio, Ratio):
        return unit
    potential = ratio.potential(rows, credit_BT)
    return unit if potential is None else unit - unit.detach() - credit_BT * potential


def _mean_weight(term: Term, batch: Batch, credit_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """Mean weight over tokens, or over responses where all ratios are those of whole responses; 1 for 0."""
    weight = torch.where(counted_BT, term.weight(batch, credit_BT.to(batch.dtype)).double(), 0.0)
    count = counted_BT.double()
    if all(isinstance(ratio, Ratio) and ratio.level in ("sequence", "mean") for ratio in term.weights):
        lengths = count.sum(1, keepdim=True).clamp(min=1)
        weight, count = weight / lengths, count / lengths
    mean = weight.sum() / count.sum().clamp(min=1)
    return torch.where(mean > 0, mean, 1.0)


def _totals(recipe: Recipe, rows: Batch, credit_BT: Tensor, losses: Mapping[str, Tensor]) -> Totals:
    """Sums and maxima over the rows; the exponentials are capped like those of the weights."""
    sums = dict(losses)
    maxima: dict[str, Tensor] = {}
    ratios = [(term.name, weight) for term in recipe.terms for weight in term.weights if isinstance(weight, Ratio)]
    for term, ratio in ratios:
        for name, count in ratio.counts(rows, credit_BT).items():
            key = name if name == "ratio_clamped" else f"{name}_{term}"
            sums[key] = sums.get(key, torch.zeros_like(count)) + count
    mask = rows.mask
    policy = rows.log({"policy": 1.0}).detach().double()
    if "behavior" in rows.models:
        cap = ratios[0][1].max_log_ratio if ratios else 20.0
        log_ratio = policy - rows.log({"behavior": 1.0}).double()
        token = torch.where(mask, log_ratio.clamp(max=cap).exp(), 0.0)
        whole = torch.where(mask.any(1), log_ratio.sum(1).clamp(max=cap).exp(), 0.0)
        sums |= {
            "tokens": mask.sum(),
            "ratio": token.sum(),
            "log_behavior_over_policy": -log_ratio.sum(),
            "sequences": mask.any(1).sum(),
            "sequence_ratio": whole.sum(),
            "sequence_ratio_squared": whole.square().sum(),
        }
        maxima["ratio_max"] = token.max()
    if "reference" in rows.models:
        sums["log_policy_over_reference"] = (policy - rows.log({"reference": 1.0}).double()).sum()
        sums["tokens_with_reference"] = mask.sum()
    values = stack({**sums, **{f"max {name}": value for name, value in maxima.items()}})
    return Totals({name: values[name] for name in sums}, {name: values[f"max {name}"] for name in maxima})
