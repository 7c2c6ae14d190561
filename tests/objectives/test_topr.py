"""TOPR: by enumeration, the expected gradient is that of the bounded objective E_mu[A h(pi / mu)]."""

import math

import pytest
import torch
from torch import Tensor

from distrl.objectives import Recipe, build, compute, prepare
from distrl.objectives.batch import Batch
from tests.objectives.tabular import close, expected, gradient, parameters, random, token_logps


def enumerate_topr(
    recipe: Recipe, logits: Tensor, behavior: Tensor, rewards: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Expected loss and its gradient with y ~ mu."""
    logps, mu = token_logps(logits, steps), token_logps(behavior, steps).detach()
    tensors = {
        "logps": logps,
        "behavior_logps": mu,
        "mask": torch.ones_like(logps, dtype=torch.bool),
        "rewards": rewards,
        "group": torch.zeros(len(logps), dtype=torch.int64),
    }
    loss = expected(recipe, tensors, mu.sum(1).exp()).loss
    return loss, gradient(loss, logits)


def h(ratio: Tensor, a: float, b: float) -> Tensor:
    """The potential as the paper writes it: h' = clip(rho, a, b) / rho, with h = rho on [a, b]."""
    value = ratio
    if b < math.inf:
        value = torch.where(ratio > b, b + b * (ratio / b).log(), value)
    if a > 0:
        value = torch.where(ratio < a, a + a * (ratio / a).log(), value)
    return value


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    ("a_plus", "b_plus", "a_minus", "b_minus"),
    [
        (1, 1, 0, 1),
        (1, 1, 1, 1),
        (0, math.inf, 0, math.inf),
        (0, 1, 0, 1),
        (0.5, 1.5, 0.1, 0.8),
        (0.9, 4, 0, 3),
    ],
)
@pytest.mark.parametrize("baseline", [0.0, 0.4])
def test_the_expected_gradient_is_that_of_the_potential(
    steps: int, a_plus: float, b_plus: float, a_minus: float, b_minus: float, baseline: float
) -> None:
    logits, behavior = parameters(4, steps, seed=1), parameters(4, steps, seed=2)
    rewards = random(4**steps, seed=3)
    recipe = build("topr", baseline=baseline, a_plus=a_plus, b_plus=b_plus, a_minus=a_minus, b_minus=b_minus)
    loss, slope = enumerate_topr(recipe, logits, behavior, rewards, steps)

    log_mu = token_logps(behavior, steps).sum(1).detach()
    ratio = (token_logps(logits, steps).sum(1) - log_mu).exp()
    credit = rewards - baseline
    potential = torch.where(credit >= 0, h(ratio, a_plus, b_plus), h(ratio, a_minus, b_minus))
    objective = (log_mu.exp() * credit * potential).sum()
    close(slope, -gradient(objective, logits))
    close(loss, -objective)


@pytest.mark.parametrize("bounds", [(1.0, 1.0, 0.0, 1.0), (0.2, 3.0, 0.5, 1.0), (0.0, math.inf, 1.0, 2.0)])
def test_on_policy_it_is_reinforce(bounds: tuple[float, float, float, float]) -> None:
    logits, rewards = parameters(4, 2, seed=5), random(16, seed=6)
    names = ("a_plus", "b_plus", "a_minus", "b_minus")
    recipe = build("topr", baseline=0.0, **dict(zip(names, bounds, strict=True)))
    _, slope = enumerate_topr(recipe, logits, logits, rewards, 2)
    close(slope, -gradient((token_logps(logits, 2).sum(1).exp() * rewards).sum(), logits))


def one_response(log_ratio: float, reward: float, recipe: str = "topr", **options: float) -> float:
    """d loss / d log pi of a single response of two tokens."""
    logps = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    tensors = {
        "logps": logps,
        "behavior_logps": logps.detach() - torch.tensor([[log_ratio / 2, log_ratio / 2]]),
        "mask": torch.ones(1, 2, dtype=torch.bool),
        "rewards": torch.tensor([reward]),
    }
    slope = torch.autograd.grad(compute(build(recipe, **options), tensors).loss, logps)[0]
    assert slope[0, 0] == slope[0, 1]
    return float(slope[0, 0])


@pytest.mark.parametrize("log_ratio", [-8.0, -1.0, 0.0, 1.0, 8.0])
def test_a_good_response_is_reinforced_fully_whatever_its_ratio(log_ratio: float) -> None:
    assert one_response(log_ratio, 3.0, baseline=0.0) == -3.0


@pytest.mark.parametrize("log_ratio", [-8.0, -1.0, 0.0, 1.0, 8.0])
def test_a_bad_response_is_importance_sampled_below_one_and_pushed_fully_above(log_ratio: float) -> None:
    weight = one_response(log_ratio, -3.0, baseline=0.0) / 3.0
    assert weight == pytest.approx(min(math.exp(log_ratio), 1.0), abs=1e-10)


def test_the_push_on_a_bad_response_is_bounded_and_fades_with_its_probability() -> None:
    pushes = [one_response(log_ratio, -3.0, baseline=0.0) for log_ratio in (30.0, 2.0, -5.0, -50.0, -300.0)]
    assert pushes == sorted(pushes, reverse=True)
    assert pushes[0] == 3.0
    assert pushes[-1] < 1e-100


def test_a_constant_baseline_adds_a_push_away_from_the_behavior_policy() -> None:
    # Without importance weights, the gradient with R - c is the one with R plus c grad KL(mu || pi).
    logits, behavior = parameters(4, 2, seed=1), parameters(4, 2, seed=2)
    rewards = random(16, seed=3)
    naive = {"a_plus": 1.0, "b_plus": 1.0, "a_minus": 1.0, "b_minus": 1.0}
    _, without = enumerate_topr(build("topr", baseline=0.0, **naive), logits, behavior, rewards, 2)
    _, shifted = enumerate_topr(build("topr", baseline=0.3, **naive), logits, behavior, rewards, 2)
    log_mu = token_logps(behavior, 2).sum(1).detach()
    divergence = (log_mu.exp() * (log_mu - token_logps(logits, 2).sum(1))).sum()
    close(-shifted, -without + 0.3 * gradient(divergence, logits))


SEQUENCE = {"level": "sequence", "baseline": "none"}
MU = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.1, -1.0, 0.5], dtype=torch.float64)


def ascend(steps: int, recipe: Recipe | None = None, rate: float = 4.0) -> Tensor:
    """log pi of four arms after plain gradient ascent from mu at learning rate 4."""
    logits = MU.log()[None].clone().requires_grad_()
    for _ in range(steps):
        _, slope = enumerate_topr(recipe or build("topr", baseline=0.0), logits, MU.log()[None], REWARDS, 1)
        with torch.no_grad():
            logits -= rate * slope
    return logits.detach().log_softmax(1)[0]


def test_the_limit_is_the_reward_weighted_good_part_of_the_behavior_policy() -> None:
    # mu+ = mu R / R+ over R > 0: (.4, .03, 0, .05) / .48. The error falls like 1 / steps.
    target = torch.tensor([0.4, 0.03, 0.0, 0.05], dtype=torch.float64) / 0.48
    distances = []
    for steps in (50, 200, 800):
        log_pi = ascend(steps)
        good = target > 0
        distances.append(float((target[good] * (target[good].log() - log_pi[good])).sum()))
    assert distances[0] > 3 * distances[1] > 9 * distances[2] > 0.0
    assert distances[2] < 5e-3
    log_pi = ascend(1000, rate=16.0)[target > 0]
    good = target[target > 0]
    assert float((good * (good.log() - log_pi)).sum()) < 1e-3


def test_topr_with_equal_intervals_is_naive_reinforce_and_symmetric_ones_are_tis() -> None:
    logits, behavior = parameters(4, 2, seed=1), parameters(4, 2, seed=2)
    rewards = random(16, seed=3)
    pairs = [
        ({"a_plus": 1.0, "b_plus": 1.0, "a_minus": 1.0, "b_minus": 1.0}, build("reinforce")),
        ({"a_plus": 0.0, "b_plus": 1.3, "a_minus": 0.0, "b_minus": 1.3}, build("tis", **SEQUENCE, high=1.3)),
        ({"a_plus": 0.0, "b_plus": math.inf, "a_minus": 0.0, "b_minus": math.inf}, build("is")),
    ]
    for options, other in pairs:
        taper = enumerate_topr(build("topr", baseline=0.0, **options), logits, behavior, rewards, 2)[1]
        close(taper, enumerate_topr(other, logits, behavior, rewards, 2)[1])


def test_the_naive_gradient_pulls_to_the_good_part_and_pushes_from_the_bad_part_of_the_sampler() -> None:
    # grad J = -R+ grad KL(mu+ || pi) + R- grad KL(mu- || pi).
    logits, behavior = parameters(4, 2, seed=1), parameters(4, 2, seed=2)
    rewards = random(16, seed=3)
    _, slope = enumerate_topr(build("reinforce"), logits, behavior, rewards, 2)
    mu, log_pi = token_logps(behavior, 2).detach().sum(1).exp(), token_logps(logits, 2).sum(1)
    total = torch.zeros_like(logits)
    for sign in (1.0, -1.0):
        part = mu * (sign * rewards).clamp(min=0)
        # grad KL(part / mass || pi) = -grad sum part / mass log pi
        total += sign * part.sum() * gradient((part / part.sum() * log_pi).sum(), logits)
    close(-slope, total)


def test_truncated_importance_sampling_has_another_limit() -> None:
    # pi = R mu / lam where R > lam, else 0: lam = .45 gives (.8889, 0, 0, .1111). The weak good arm is
    # dropped.
    pi = ascend(800, build("tis", level="sequence", high=1.0, baseline="none")).exp()
    torch.testing.assert_close(pi, torch.tensor([8 / 9, 0.0, 0.0, 1 / 9], dtype=torch.float64), atol=5e-3, rtol=0)


def test_without_a_taper_a_bad_arm_falls_without_bound_and_linearly() -> None:
    first, second = ascend(200, build("reinforce")), ascend(400, build("reinforce"))
    # d J / d z = mu R - pi sum(mu R): its logit falls by 4 * .2 per step, that of the winning arm, whose pi
    # is 1 by then, rises by 4 (.4 - .28).
    assert float(first[2] - second[2]) == pytest.approx(200 * 4 * (0.2 + 0.12), rel=1e-6)
    assert float(ascend(200)[2] - ascend(400)[2]) < 3.0


@pytest.mark.parametrize("fraction", [0.1, 0.35, 0.8])
@pytest.mark.parametrize("baseline", [-0.6, 0.0, 0.5])
def test_effective_positives_follow_the_formula_and_its_inverse(fraction: float, baseline: float) -> None:
    # Rewards in {-1, +1}: p~ = p (1 - c) / (1 + (1 - 2p) c), c = (p - p~) / (p + p~ - 2 p p~).
    count = 20
    rewards = torch.where(torch.arange(count) < round(fraction * count), 1.0, -1.0)
    batch = Batch.from_tensors({"mask": torch.ones(count, 3).bool(), "rewards": rewards}, recipe="topr")
    effective = prepare(build("topr", baseline=baseline), batch).metrics["effective_positives"]
    wanted = fraction * (1 - baseline) / (1 + (1 - 2 * fraction) * baseline)
    assert effective == pytest.approx(wanted, abs=1e-12)
    inverse = (fraction - effective) / (fraction + effective - 2 * fraction * effective)
    assert inverse == pytest.approx(baseline, abs=1e-10)
    mean = prepare(build("topr", baseline=float(rewards.double().mean())), batch).metrics
    assert mean["effective_positives"] == pytest.approx(0.5, abs=1e-12)
