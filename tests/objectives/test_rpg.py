"""RPG: every row of the paper's table by enumeration, both forms, and the regions of the clip."""

import math

import pytest
import torch
from torch import Tensor

from distrl.objectives import build, compute
from tests.objectives.tabular import (
    close,
    expected,
    gradient,
    parameters,
    random,
    responses,
    sequence_kl,
    sequence_logps,
    token_logps,
)

FORMS = ["reinforce", "differentiable"]
each_form = pytest.mark.parametrize("form", FORMS)
each_row = pytest.mark.parametrize("row", ["rkl", "fkl", "urkl", "ufkl"])


def forward_kl(logits: Tensor, other: Tensor, steps: int) -> Tensor:
    log_other = sequence_logps(other, steps).detach()
    return (log_other.exp() * (log_other - sequence_logps(logits, steps))).sum()


@each_row
@each_form
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("anchor", ["behavior", "reference"])
def test_unclipped_it_is_the_gradient_of_reward_minus_divergence(row: str, form: str, steps: int, anchor: str) -> None:
    logits, behavior, reference = (parameters(3, steps, seed=seed) for seed in (1, 2, 3))
    rewards, beta = random(3**steps, seed=4), 0.6
    tensors = responses(logits, steps, behavior_logps=behavior, ref_logps=reference)
    tensors |= {"rewards": rewards, "group": torch.zeros(3**steps, dtype=torch.int64)}
    options = {"divergence": row, "form": form, "level": "sequence", "clip": "none", "anchor": anchor}
    recipe = build("rpg", kl_coefficient=beta, **options)
    output = expected(recipe, tensors, sequence_logps(behavior, steps).exp())
    other = behavior if anchor == "behavior" else reference
    # Over normalized policies the mass terms vanish, so that both forms of a KL have one gradient.
    divergence = (sequence_kl if "rkl" in row else forward_kl)(logits, other, steps)
    objective = (sequence_logps(logits, steps).exp() * rewards).sum() - beta * divergence
    close(gradient(output.loss, logits), -gradient(objective, logits))
    if form == "differentiable":
        # The value is the objective, its rewards minus their group mean; mass terms are 0 in expectation.
        close(output.loss, -(objective - rewards.mean()))


def push(log_w: float, credit: float, row: str, form: str = "reinforce", **options: float | str) -> float:
    """-d loss / d log pi of one token whose credit is `credit`, beta = 0.5."""
    logps = torch.tensor([[-1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    tensors = {
        "logps": logps,
        "behavior_logps": torch.tensor([[-1.0 - log_w], [-1.0]], dtype=torch.float64),
        "mask": torch.ones(2, 1).bool(),
        "rewards": torch.tensor([2 * credit, 0.0], dtype=torch.float64),  # group mean: credit
        "group": torch.zeros(2, dtype=torch.int64),
    }
    recipe = build("rpg", divergence=row, form=form, kl_coefficient=0.5, **options)
    slope = torch.autograd.grad(compute(recipe, tensors).loss, logps)[0]
    return -2 * float(slope[0, 0])  # the mean is over two tokens


def weight(row: str, w: float, credit: float) -> float:
    """The exact weight of the paper's table, beta = 0.5."""
    return {
        "fkl": w * credit + 0.5,
        "rkl": w * (credit - 0.5 * (math.log(w) + 1)),
        "ufkl": w * credit - 0.5 * (w - 1),
        "urkl": w * (credit - 0.5 * math.log(w)),
    }[row]


@each_row
@each_form
@pytest.mark.parametrize("w", [0.01, 0.7, 1.0, 1.3, 20.0])
def test_the_weight_of_a_sample_is_that_of_the_table(row: str, form: str, w: float) -> None:
    for credit in (1.5, -0.8):
        actual = push(math.log(w), credit, row, form, clip="none")
        assert actual == pytest.approx(weight(row, w, credit), abs=1e-10)


@each_form
def test_at_the_sampler_itself_only_the_normalized_forms_have_a_kl_weight(form: str) -> None:
    pushes = {row: push(0.0, 1.0, row, form, clip="none") for row in ("fkl", "rkl", "ufkl", "urkl")}
    assert pushes == pytest.approx({"fkl": 1.5, "rkl": 0.5, "ufkl": 1.0, "urkl": 1.0})


def slope_of_f(row: str, w: float) -> float:
    return {"rkl": math.log(w) + 1, "fkl": -1 / w, "urkl": math.log(w), "ufkl": 1 - 1 / w}[row]


@each_row
@each_form
@pytest.mark.parametrize("w", [0.5, 0.85, 1.0, 1.15, 1.27, 1.4, 5.0])
@pytest.mark.parametrize("credit", [2.0, 0.3, -0.3, -2.0])
def test_the_clip_is_dual_and_looks_at_the_regularized_credit(row: str, form: str, w: float, credit: float) -> None:
    regularized = credit - 0.5 * slope_of_f(row, w)
    inside = w < 1.28 if regularized >= 0 else 0.8 < w < 3.0
    actual = push(math.log(w), credit, row, form, dual_clip=3.0)
    assert actual == pytest.approx(weight(row, w, credit) if inside else 0.0, abs=1e-10)


@each_form
def test_clipped_it_is_the_gradient_of_the_dual_clipped_surrogate(form: str) -> None:
    # Without the divergence: max(-w A, -clip(w) A), and at most -c A where A < 0, per token.
    logits, behavior = parameters(4, 2, seed=1), parameters(4, 2, seed=2)
    rewards = random(16, seed=3)
    tensors = responses(logits, 2, behavior_logps=behavior)
    tensors |= {"rewards": rewards, "group": torch.zeros(16, dtype=torch.int64)}
    log_mu = token_logps(behavior, 2).detach()
    recipe = build("rpg", form=form, kl_coefficient=0.0, dual_clip=1.5)
    output = expected(recipe, tensors, log_mu.sum(1).exp())
    w, credit = (token_logps(logits, 2) - log_mu).exp(), (rewards - rewards.mean())[:, None]
    loss = torch.maximum(-w * credit, -w.clamp(0.8, 1.28) * credit)
    loss = torch.where(credit < 0, torch.minimum(loss, -1.5 * credit), loss)
    close(gradient(output.loss, logits), gradient((log_mu.sum(1).exp() * loss.mean(1)).sum(), logits))


@each_row
def test_a_constant_added_to_the_weight_changes_nothing_on_policy(row: str) -> None:
    # E_pi[grad log pi] = 0: with old = pi all four rows give the policy gradient.
    logits, rewards = parameters(3, 2, seed=1), random(9, seed=2)
    tensors = responses(logits, 2, behavior_logps=logits)
    tensors |= {"rewards": rewards, "group": torch.zeros(9, dtype=torch.int64)}
    log_pi = sequence_logps(logits, 2)
    recipe = build("rpg", divergence=row, level="sequence", kl_coefficient=0.6)
    slope = gradient(expected(recipe, tensors, log_pi.exp()).loss, logits)
    close(slope, -gradient((log_pi.exp() * rewards).sum(), logits))


def test_the_metric_of_the_clip_looks_at_the_regularized_credit_too() -> None:
    # w = 1.4: A = 0.1 alone would be clipped above 1.28, A - 0.5 (1 - 1/1.4) < 0 is inside the dual clip.
    tensors = {
        "logps": torch.tensor([[math.log(1.4)], [0.0]], dtype=torch.float64),
        "behavior_logps": torch.zeros(2, 1).double(),
        "mask": torch.ones(2, 1).bool(),
        "rewards": torch.tensor([0.2, 0.0], dtype=torch.float64),
        "group": torch.zeros(2, dtype=torch.int64),
    }
    assert compute(build("rpg", kl_coefficient=0.5), tensors).metrics["at_bound_policy"] == 0.0
    assert compute(build("rpg", kl_coefficient=0.0), tensors).metrics["at_bound_policy"] == 0.5
