"""Evaluate a recipe: once per step on the whole batch (`prepare`), then on any part of it (`evaluate`)."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from distrl.errors import SchemaError
from distrl.objectives.baselines import One
from distrl.objectives.batch import Batch
from distrl.objectives.build import build
from distrl.objectives.credit import Credited
from distrl.objectives.losses import Score
from distrl.objectives.quantiles import bin_counts
from distrl.objectives.recipe import LossOutput, Plan, Recipe, Term, Totals, stack
from distrl.objectives.schedules import Fixed


def required_columns(recipe: Recipe) -> frozenset[str]:
    """What a run must produce for a recipe.

    Returns:
        Column names ("rewards", "group") and model names ("policy", "behavior", "reference", "proximal").
        With "reference" in it, every response must be scored by the reference model.
    """
    return recipe.needs


def prepare(recipe: Recipe, batch: Batch, last_metrics: Mapping[str, float] | None = None) -> Plan:
    """What one optimizer step needs to know of the whole global batch: credits, counts, coefficients.

    Log-probabilities of the policy are read only where rewards, returns or self-normalized terms do: those
    under the proximal policy, or the current ones, detached, where none are recorded. Every other recipe
    needs no forward pass before this.

    Args:
        batch: every response of the step, over all micro-batches and ranks.
        last_metrics: metrics of the step before, for schedules that control something.

    Raises:
        SchemaError: a tensor is missing or has the wrong shape.
    """
    batch.check(recipe.name)
    columns = recipe.prepare_needs
    batch = replace(batch.at_proximal(), metrics=last_metrics or {})
    batch.require(recipe.name, _given(recipe, columns))
    if columns & recipe.anchors.keys():
        batch = recipe.derive(batch)
    credit = recipe.credit(batch)
    shares = []
    for term in recipe.terms:
        share = term.share(batch)
        if term.self_normalize:
            share = share / _mean_weight(term, batch, credit.tokens, share > 0)
        shares.append(share)
    coefficients = tuple(term.coefficient(batch.step, batch.metrics) for term in recipe.terms)
    made = {}
    if "values" in recipe.needs:
        made = {"value_targets": credit.targets, "values_old": batch.column("values", torch.float64).detach()}
    metrics = _plan_metrics(recipe, batch, credit, coefficients)
    return Plan(credit.tokens, tuple(shares), coefficients, metrics, made, batch.columns.get("pairs"))


def evaluate(recipe: Recipe, rows: Batch, plan: Plan) -> LossOutput:
    """The part of the global loss that some rows contribute.

    Args:
        rows: any whole groups of the batch that was prepared, in any order and split, with fresh
            log-probabilities, and fresh values and logits where the recipe reads them.
        plan: `plan.rows(index)` for the same rows; it may lie on another device.

    Returns:
        Losses of parts add up to the loss of the whole, and so do their gradients.

    Raises:
        SchemaError: a tensor is missing or has the wrong shape, or the plan is of other rows.
    """
    rows.check(recipe.name)
    rows.require(recipe.name, _given(recipe, frozenset({"policy"}).union(*(term.needs for term in recipe.terms))))
    if plan.credit.shape != rows.mask.shape:
        raise SchemaError(
            f"{recipe.name} needs a plan of the same rows, of shape {list(rows.mask.shape)} like the mask, "
            f"got {list(plan.credit.shape)}; pass plan.rows(index, width) with the index of batch.rows"
        )
    device = rows.mask.device
    rows = replace(rows, columns={**rows.columns, **{name: x.to(device) for name, x in plan.columns.items()}})
    rows = recipe.derive(rows)
    credit = plan.credit.to(device, rows.dtype)
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


def _given(recipe: Recipe, names: frozenset[str]) -> frozenset[str]:
    """What a batch has to bring for `names`: derived models replaced by what they are derived from."""
    derived = (column.needs for name, column in recipe.anchors.items() if name in names)
    return (names - recipe.anchors.keys()).union(*derived)


def _plan_metrics(recipe: Recipe, batch: Batch, credit: Credited, coefficients: tuple[float, ...]) -> dict[str, float]:
    """Of the whole batch: credits, and the coefficients that move or that the credit's scale divides."""
    responses = credit.responses
    total = responses.abs().sum()
    values = {
        "credit_mean": responses.mean(),
        "credit_zero": (responses == 0).double().mean(),
        "effective_positives": responses.clamp(min=0).sum() / torch.where(total > 0, total, 1.0),
    }
    strength = sum(penalty.strength(batch) for penalty in recipe.credit.penalties)
    if recipe.credit.penalties and not isinstance(recipe.credit.scale, One):
        scaled = torch.where(batch.mask, strength / credit.scale, 0.0)
        values["effective_kl_coefficient"] = scaled.sum() / batch.mask.sum().clamp(min=1)
    moving = {
        f"coefficient_{term.name}": coefficient
        for term, coefficient in zip(recipe.terms, coefficients, strict=True)
        if not isinstance(term.coefficient, Fixed)
    }
    if any(not isinstance(penalty.coefficient, Fixed) for penalty in recipe.credit.penalties):
        moving["coefficient_kl"] = strength
    return stack(values) | moving


def _unit_losses(term: Term, rows: Batch, credit_BT: Tensor) -> Tensor:
    """The loss of each unit, its value the potential where the gradient is that of one.

    That is the case for a score under one ratio of the policy; ratios of other models are constants.
    """
    unit = term.loss(rows, credit_BT, term.weight(rows, credit_BT))
    moving = [ratio for ratio in term.ratios if "policy" in (*ratio.of, *ratio.over)]
    if not isinstance(term.loss, Score) or len(moving) != 1:
        return unit
    potential = moving[0].potential(rows, credit_BT)
    for weight in term.weights:
        if potential is not None and weight is not moving[0]:
            potential = potential * weight(rows, credit_BT)
    return unit if potential is None else unit - unit.detach() - credit_BT * potential


def _mean_weight(term: Term, batch: Batch, credit_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """Mean weight over tokens, or over responses where all ratios are those of whole responses; >= 1e-6."""
    weight = torch.where(counted_BT, term.weight(batch, credit_BT.to(batch.dtype)).double(), 0.0)
    count = counted_BT.double()
    if all(ratio.level in ("sequence", "mean") for ratio in term.ratios):
        lengths = count.sum(1, keepdim=True).clamp(min=1)
        weight, count = weight / lengths, count / lengths
    # A batch that is as good as lost to the policy is not blown up: a millionth bounds what its rows can gain.
    return (weight.sum() / count.sum().clamp(min=1)).clamp(min=1e-6)


def _totals(recipe: Recipe, rows: Batch, credit_BT: Tensor, losses: Mapping[str, Tensor]) -> Totals:
    """Sums and maxima over the rows; the exponentials are capped like those of the weights."""
    sums = dict(losses)
    maxima: dict[str, Tensor] = {}
    ratios = [(term, ratio) for term in recipe.terms for ratio in term.ratios]
    for term, ratio in ratios:
        for name, count in ratio.counts(rows, term.gate_credit(rows, credit_BT)).items():
            key = name if name == "ratio_clamped" else f"{name}_{term.name}"
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
        sums |= bin_counts(log_ratio, mask)
        maxima["ratio_max"] = token.max()
    if "reference" in rows.models:
        sums["log_policy_over_reference"] = (policy - rows.log({"reference": 1.0}).double()).sum()
        sums["tokens_with_reference"] = mask.sum()
    values = stack({**sums, **{f"max {name}": value for name, value in maxima.items()}})
    return Totals({name: values[name] for name in sums}, {name: values[f"max {name}"] for name in maxima})
