"""Split, order, padding, masked garbage and extreme ratios: what must not change a result, for every
recipe."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distrl.objectives import (
    Batch,
    LossOutput,
    Recipe,
    Totals,
    build,
    combine,
    compute,
    evaluate,
    prepare,
    recipe_names,
)
from distrl.objectives.batch import LIVE
from distrl.objectives.recipe import Term
from distrl.objectives.schedules import Linear
from tests.objectives.tabular import close, random


def self_normalized(recipe: Recipe) -> Recipe:
    return replace(recipe, terms=tuple(replace(term, self_normalize=True) for term in recipe.terms))


VARIANTS: dict[str, Recipe] = {name: build(name) for name in recipe_names()}
VARIANTS |= {
    "topr kl": build("topr", kl_coefficient=0.1, kl_estimator="k3", b_minus=0.8),
    "topr positives": build("topr", baseline_kind="positives"),
    "topr self-normalized": self_normalized(build("topr", kl_coefficient=0.1)),
    "grpo without kl": build("grpo", kl_coefficient=0.0),
    "grpo full rows": build("grpo", kl_rows="full", kl_estimator="js"),
    "grpo top-k": build("grpo", kl_rows="full", kl_top_k=2.0),
    "grpo chi2": build("grpo", kl_estimator="chi2"),
    "is kl": build("is", kl_coefficient=0.1),
    "tis sequence": build("tis", level="sequence", kl_coefficient=0.1),
    "tis self-normalized": build("tis", self_normalize="batch"),
    "icepop sequence": build("icepop", level="sequence"),
    "dapo kl overlong": build("dapo", kl_coefficient=0.1, overlong_max_length=6.0, overlong_cache=3.0),
    "rloo kl": build("rloo", kl_coefficient=0.1),
    "reinforce_pp baseline": build("reinforce_pp", baseline="group_mean"),
    "ppo vtrace": build("ppo", returns="vtrace", gamma=0.9, lam=0.9, dual_clip=3.0),
    "ppo kl": build("ppo", normalize="none", kl_coefficient=0.1),
    "decoupled_ppo loglinear": build("decoupled_ppo", proximal="loglinear"),
    **{
        f"rpg {d} {f}": build("rpg", divergence=d, form=f)
        for d in ("rkl", "fkl")
        for f in ("reinforce", "differentiable")
    },
    "rpg reference": build("rpg", anchor="reference", level="sequence", form="differentiable", clip="none"),
    "a_star_po off-policy": build("a_star_po", importance="sequence"),
}
RECIPES = list(VARIANTS.values())
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=list(VARIANTS))


def example(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Four groups of three responses, 2 to 7 of 7 positions learnable, holes included, with every tensor that a
    recipe reads."""
    behavior = -random(12, 7, seed=1).exp()
    mask = torch.arange(7) < torch.arange(12)[:, None] % 6 + 2
    mask[3, 1] = mask[8, 0] = False
    rewards = (random(12, seed=4) > 0).double()
    tensors = {
        "logps": behavior + 0.4 * random(12, 7, seed=2),
        "behavior_logps": behavior,
        "proximal_logps": behavior + 0.3 * random(12, 7, seed=5),
        "ref_logps": behavior + 0.4 * random(12, 7, seed=3),
        "anchor_logps": behavior + 0.2 * random(12, 7, seed=6),
        "rewards": rewards,
        "v_star": rewards * 0.2 + 0.3,
        "preference": random(12, seed=7).sigmoid(),
        "pair_preference": random(8, seed=8).sigmoid(),
        "values": random(12, 7, seed=9),
        "logits": random(12, 7, 5, seed=10),
        "ref_logits": random(12, 7, 5, seed=11),
    }
    group = torch.arange(12) % 4
    # Two pairs of each group: rows g and g + 4, rows g + 8 and g.
    pairs = torch.cat([torch.stack([group[:4], group[:4] + 4], 1), torch.stack([group[:4] + 8, group[:4]], 1)])
    whole = {"mask": mask, "group": group, "pairs": pairs, "policy_versions": torch.arange(84).reshape(12, 7) % 5 - 4}
    return whole | {name: x.to(dtype) for name, x in tensors.items()}


def per_row(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that have one row per response."""
    return {name: x for name, x in tensors.items() if name not in ("pairs", "pair_preference")}


def loss_and_gradient(recipe: Recipe, tensors: dict[str, Tensor]) -> tuple[LossOutput, Tensor]:
    logps = tensors["logps"].clone().requires_grad_()
    live = {name: tensors[name].clone().requires_grad_() for name in LIVE}
    output = compute(recipe, {**tensors, **live, "logps": logps})
    slopes = torch.autograd.grad(output.loss, [logps, *live.values()], allow_unused=True)
    # One tensor of all gradients: of log-probabilities, values and logits, in this order.
    shapes = [
        slope if slope is not None else torch.zeros_like(x)
        for slope, x in zip(slopes, [logps, *live.values()], strict=True)
    ]
    return output, torch.cat([shapes[0][..., None], shapes[1][..., None], shapes[2]], -1)


@each_recipe
def test_parts_of_whole_groups_add_up_to_the_whole(recipe: Recipe) -> None:
    tensors = example()
    whole, slope = loss_and_gradient(recipe, tensors)

    reads_logps = any(term.self_normalize for term in recipe.terms) or "policy" in recipe.credit.needs
    known = {name: x for name, x in tensors.items() if name != "logps" or reads_logps}
    batch = Batch.from_tensors(known, recipe=recipe.name)
    plan = prepare(recipe, batch)
    outputs, slopes = [], torch.zeros_like(slope)
    for groups in ([2], [0, 3], [1]):
        index = torch.isin(tensors["group"], torch.tensor(groups)).nonzero()[:, 0].flip(0)
        width = int(tensors["mask"][index].any(0).nonzero().max()) + 1
        logps = tensors["logps"][index, :width].clone().requires_grad_()
        fresh = {name: tensors[name][index, :width].clone().requires_grad_() for name in LIVE}
        output = evaluate(recipe, batch.rows(index, logps, fresh), plan.rows(index, width))
        parts = torch.autograd.grad(output.loss, [logps, *fresh.values()], allow_unused=True)
        for part, where in zip(parts, (slopes[..., 0], slopes[..., 1], slopes[..., 2:]), strict=True):
            if part is not None:
                where[index, :width] = part
        outputs.append(output)
    close(torch.stack([output.loss for output in outputs]).sum(), whole.loss)
    close(slopes, slope)
    assert combine(outputs) == pytest.approx(dict(whole.metrics), rel=1e-10)
    assert Totals.merge(x.totals for x in outputs).metrics() == pytest.approx(whole.totals.metrics(), rel=1e-10)


@each_recipe
def test_the_order_of_responses_and_group_numbers_do_not_matter(recipe: Recipe) -> None:
    tensors = example()
    whole, slope = loss_and_gradient(recipe, tensors)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    shuffled = {name: x[order] for name, x in per_row(tensors).items()}
    shuffled |= {"pairs": order.argsort()[tensors["pairs"]], "pair_preference": tensors["pair_preference"]}
    again, moved = loss_and_gradient(recipe, {**shuffled, "group": 100 - 7 * shuffled["group"]})
    close(again.loss, whole.loss)
    close(moved, slope[order])
    assert dict(again.metrics) == pytest.approx(dict(whole.metrics), rel=1e-10)


@each_recipe
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_and_what_stands_under_the_mask_do_not_matter(recipe: Recipe, garbage: float) -> None:
    tensors = example()
    whole, slope = loss_and_gradient(recipe, tensors)
    padded = dict(tensors)
    for name, x in per_row(tensors).items():
        if x.ndim > 1:
            fill = False if x.dtype == torch.bool else garbage if x.is_floating_point() else -99
            mask = tensors["mask"] if x.ndim == 2 else tensors["mask"][..., None]
            padded[name] = torch.cat([torch.where(mask, x, fill), torch.full_like(x[:, :2], fill)], 1)
    again, moved = loss_and_gradient(recipe, padded)
    close(again.loss, whole.loss)
    close(moved[:, :7], slope)
    assert not moved[~padded["mask"]].any()
    assert dict(again.metrics) == pytest.approx(dict(whole.metrics), rel=1e-10)


@each_recipe
@pytest.mark.parametrize("drift", [200.0, -200.0])
def test_float32_stays_finite_for_token_log_ratios_of_200(recipe: Recipe, drift: float) -> None:
    tensors = example(torch.float32)
    tensors["behavior_logps"] = tensors["logps"] - drift
    tensors["proximal_logps"] = tensors["logps"] - drift / 2
    tensors["ref_logps"] = tensors["logps"] + drift
    tensors["anchor_logps"] = tensors["logps"] - drift
    tensors["logits"][:, ::2, 0] += drift
    tensors["ref_logits"][:, ::2, 1] += drift
    output, slope = loss_and_gradient(recipe, tensors)
    assert bool(output.loss.isfinite())
    assert bool(slope.isfinite().all())
    assert all(math.isfinite(value) for value in output.metrics.values())
    if any(term.ratios for term in recipe.terms) and recipe.name != "decoupled_ppo":
        assert (output.metrics["ratio_clamped"] > 0) is (drift > 0)


def test_the_cap_acts_after_the_sum_over_tokens() -> None:
    # Two tokens of log ratio 15 and -14: their sum is 1, and nothing is capped although one of them nearly
    # would be.
    logps = torch.zeros(1, 2, dtype=torch.float64).requires_grad_()
    tensors = {
        "logps": logps,
        "behavior_logps": torch.tensor([[-15.0, 14.0]], dtype=torch.float64),
        "mask": torch.ones(1, 2).bool(),
        "rewards": torch.zeros(1),
    }
    output = compute(build("topr", b_minus=math.inf, max_log_ratio=10.0), tensors)
    (slope,) = torch.autograd.grad(output.loss, logps)
    close(slope, torch.full((1, 2), 0.5 * math.e, dtype=torch.float64))
    assert output.metrics["ratio_clamped"] == 0


def test_a_response_without_learnable_tokens_counts_in_its_group_but_not_in_the_loss() -> None:
    tensors = example()
    tensors["mask"][0] = False
    credit = prepare(VARIANTS["grpo"], Batch.from_tensors(tensors, recipe="grpo")).credit
    rewards = tensors["rewards"][[0, 4, 8]]
    wanted = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
    close(credit[[4, 8]].amax(1) + credit[[4, 8]].amin(1), wanted[1:])
    plan = prepare(VARIANTS["topr"], Batch.from_tensors(tensors, recipe="topr"))
    close(plan.shares[0].amax(1), torch.tensor([0.0] + [1 / 11] * 11, dtype=torch.float64))


def test_metrics_are_what_a_loop_over_tokens_gives() -> None:
    tensors = example()
    metrics = compute(build("topr", kl_coefficient=0.1), tensors).metrics
    difference = tensors["logps"] - tensors["behavior_logps"]
    tokens = difference[tensors["mask"]]
    assert metrics["ratio_mean"] == pytest.approx(float(tokens.exp().mean()))
    assert metrics["ratio_max"] == pytest.approx(float(tokens.exp().max()))
    assert metrics["kl_behavior"] == pytest.approx(-float(tokens.mean()))
    away = (tensors["logps"] - tensors["ref_logps"])[tensors["mask"]]
    assert metrics["kl_reference"] == pytest.approx(float(away.mean()))
    weights = torch.stack([row[mask].sum().exp() for row, mask in zip(difference, tensors["mask"], strict=True)])
    assert metrics["ess"] == pytest.approx(float(weights.sum() ** 2 / (12 * (weights**2).sum())))
    bad = tensors["rewards"] == 0
    assert metrics["at_bound_policy"] == pytest.approx(float(((weights > 1) & bad).sum()) / 12)
    assert metrics["at_bound_kl"] == pytest.approx(float((tokens.exp() > 2).double().mean()))
    assert metrics["credit_mean"] == pytest.approx(float(tensors["rewards"].mean()) - 0.5)
    assert metrics["credit_zero"] == 0.0
    assert metrics["loss"] == pytest.approx(metrics["loss_policy"] + metrics["loss_kl"])


def test_self_normalized_weights_average_one() -> None:
    tensors = {**example(), "rewards": torch.zeros(12)}
    del tensors["proximal_logps"]
    plain = build("topr", b_minus=math.inf)
    weights = (tensors["logps"] - tensors["behavior_logps"]).mul(tensors["mask"]).sum(1).exp()
    _, slope = loss_and_gradient(plain, tensors)
    _, normalized = loss_and_gradient(self_normalized(plain), tensors)
    close(normalized, slope / weights.mean())


def test_prepare_normalizes_by_the_proximal_policy_where_it_is_recorded() -> None:
    tensors = {**example(), "rewards": torch.zeros(12)}
    tensors["proximal_logps"] = tensors["behavior_logps"]  # every weight is 1 under it
    recipe = self_normalized(build("topr", b_minus=math.inf))
    plan = prepare(recipe, Batch.from_tensors(tensors, recipe="topr"))
    close(plan.shares[0], tensors["mask"].double() / 12)


def test_weights_follow_the_fresh_policy_under_one_plan() -> None:
    tensors = example()
    batch = Batch.from_tensors({name: x for name, x in tensors.items() if name != "logps"}, recipe="topr")
    plan = prepare(VARIANTS["topr"], batch)
    everything = torch.arange(12)
    moved = tensors["logps"] - 0.5
    output = evaluate(VARIANTS["topr"], batch.rows(everything, moved), plan.rows(everything))
    close(output.loss, compute(VARIANTS["topr"], {**tensors, "logps": moved}).loss)


def test_divisor_and_token_shares() -> None:
    batch = Batch.from_tensors(example(), recipe="topr")
    mask, loss = batch.mask.double(), VARIANTS["topr"].terms[0].loss
    close(Term("policy", loss, per="token").share(batch), mask / mask.sum())
    close(Term("policy", loss, per="sequence_sum", divisor=5.0).share(batch), mask / 60)
    close(Term("policy", loss, per="sequence_mean").share(batch), mask / mask.sum(1, keepdim=True) / 12)


def test_a_coefficient_follows_its_schedule() -> None:
    recipe = build("topr", kl_coefficient=1.0)
    kl = replace(recipe.terms[1], coefficient=Linear(0.4, 0.0, 10))
    recipe = replace(recipe, terms=(recipe.terms[0], kl))
    coefficients = [
        prepare(recipe, Batch.from_tensors(example(), recipe="topr", step=step)).coefficients[1]
        for step in (0, 5, 10, 99)
    ]
    assert coefficients == pytest.approx([0.4, 0.2, 0.0, 0.0])
