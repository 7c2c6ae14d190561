"""A*-PO: the regression's gradient, its optimum, and when a wrong value is only a baseline."""

import math

import pytest
import torch
from torch import Tensor

from distrl.errors import ConfigError, SchemaError
from distrl.objectives import build, compute, optimal_value
from tests.objectives.tabular import (
    close,
    expected,
    gradient,
    parameters,
    random,
    responses,
    sequence_kl,
    sequence_logps,
)

each_length = pytest.mark.parametrize("steps", [1, 2])


def optimum(reference: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log pi* of every response and V* by their definitions."""
    value = beta * torch.logsumexp(reference + rewards / beta, 0)
    return reference + (rewards - value) / beta, value


@each_length
@pytest.mark.parametrize("shift", [0.0, -0.7, 5.0])
def test_on_policy_its_gradient_is_that_of_the_regularized_reward_for_any_value(steps: int, shift: float) -> None:
    logits, reference = parameters(3, steps, seed=1), parameters(3, steps, seed=2)
    rewards, beta = random(3**steps, seed=3), 0.4
    tensors = responses(logits, steps, ref_logps=reference)
    tensors |= {"rewards": rewards, "v_star": torch.full((3**steps,), shift).double()}
    log_pi = sequence_logps(logits, steps)
    output = expected(build("a_star_po", beta=beta), tensors, log_pi.exp())
    objective = (log_pi.exp() * rewards).sum() - beta * sequence_kl(logits, reference, steps)
    close(gradient(output.loss, logits), -2 * beta * gradient(objective, logits))


@each_length
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_off_policy_the_exact_ratio_keeps_that_gradient_for_any_value(steps: int, shift: float) -> None:
    logits, behavior, reference = (parameters(3, steps, seed=seed) for seed in (1, 2, 3))
    rewards, beta = random(3**steps, seed=4), 0.4
    tensors = responses(logits, steps, behavior_logps=behavior, ref_logps=reference)
    tensors |= {"rewards": rewards, "v_star": torch.full((3**steps,), shift).double()}
    recipe = build("a_star_po", beta=beta, importance="sequence")
    output = expected(recipe, tensors, sequence_logps(behavior, steps).exp())
    objective = (sequence_logps(logits, steps).exp() * rewards).sum() - beta * sequence_kl(logits, reference, steps)
    close(gradient(output.loss, logits), -2 * beta * gradient(objective, logits))


def test_a_truncated_ratio_is_the_exact_one_below_its_bound() -> None:
    """Weight 1 where pi / mu >= 1 = max_ratio, the ratio itself elsewhere; by the definition of the loss."""
    logits, behavior, reference = (parameters(4, 1, seed=seed) for seed in (1, 2, 3))
    rewards, beta = random(4, seed=4), 0.4
    tensors = responses(logits, 1, behavior_logps=behavior, ref_logps=reference)
    tensors |= {"rewards": rewards, "v_star": torch.zeros(4).double()}
    mu = sequence_logps(behavior, 1).exp()
    output = expected(build("a_star_po", beta=beta, importance="truncated", max_ratio=1.0), tensors, mu)
    log_pi = sequence_logps(logits, 1)
    ratio = (log_pi.exp() / mu).detach()
    assert bool((ratio > 1).any())
    assert bool((ratio < 1).any())
    residual = beta * (log_pi - sequence_logps(reference, 1)) - rewards
    loss = (mu * ratio.clamp(max=1.0) * residual.square()).sum()
    close(gradient(output.loss, logits), gradient(loss, logits))


def at_the_optimum(shift: float, importance: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient at pi* under another sampler, with the value wrong by `shift`."""
    reference, behavior = parameters(4, 1, seed=5).detach().log_softmax(1), parameters(4, 1, seed=6)
    rewards, beta = random(4, seed=7), 0.4
    best, value = optimum(reference[0], rewards, beta)
    logits = best[None].clone().requires_grad_()
    tensors = responses(logits, 1, behavior_logps=behavior, ref_logps=reference)
    tensors |= {"rewards": rewards, "v_star": (value + shift).expand(4)}
    recipe = build("a_star_po", beta=beta, importance=importance)
    output = expected(recipe, tensors, sequence_logps(behavior, 1).exp())
    return output.loss, gradient(output.loss, logits)


def test_with_the_right_value_loss_and_gradient_vanish_at_the_optimum_whoever_samples() -> None:
    loss, slope = at_the_optimum(0.0, "none")
    close(loss, torch.zeros_like(loss))
    close(slope, torch.zeros_like(slope))


@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_with_a_wrong_value_off_policy_the_optimum_is_left_unless_weighted(shift: float) -> None:
    _, slope = at_the_optimum(shift, "none")
    assert slope.abs().max() > 0.01
    _, slope = at_the_optimum(shift, "sequence")
    close(slope, torch.zeros_like(slope))


def test_without_a_kl_its_direction_is_that_of_reinforce() -> None:
    logits, reference = parameters(3, 2, seed=1), parameters(3, 2, seed=2)
    rewards, beta = random(9, seed=3), 1e-9
    tensors = responses(logits, 2, ref_logps=reference) | {"rewards": rewards, "v_star": torch.zeros(9)}
    log_pi = sequence_logps(logits, 2)
    regression = gradient(expected(build("a_star_po", beta=beta), tensors, log_pi.exp()).loss, logits)
    reinforce = gradient(expected(build("reinforce"), tensors, log_pi.exp()).loss, logits)
    torch.testing.assert_close(regression / (2 * beta), reinforce, rtol=1e-6, atol=1e-8)


def test_only_the_difference_of_reward_and_value_matters() -> None:
    logits, reference = parameters(3, 2, seed=1), parameters(3, 2, seed=2)
    rewards, value = random(9, seed=3), random(9, seed=4)
    tensors = responses(logits, 2, ref_logps=reference)
    one = compute("a_star_po", {**tensors, "rewards": rewards, "v_star": value})
    other = compute("a_star_po", {**tensors, "rewards": rewards + 3.0, "v_star": value + 3.0})
    close(one.loss, other.loss)
    close(gradient(one.loss, logits), gradient(other.loss, logits))


def test_the_loss_of_a_response_by_hand() -> None:
    # beta = 2: log pi = -1 - 2 = -3, log ref = -1.5 - 0.5 = -2: (2 * -1 - (1 - 0.25))^2 = 2.75^2.
    tensors = {
        "mask": torch.tensor([[True, True]]),
        "logps": torch.tensor([[-1.0, -2.0]], dtype=torch.float64),
        "ref_logps": torch.tensor([[-1.5, -0.5]], dtype=torch.float64),
        "rewards": torch.tensor([1.0]),
        "v_star": torch.tensor([0.25]),
    }
    assert float(compute(build("a_star_po", beta=2.0), tensors).loss) == pytest.approx(2.75**2)


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("correct", [0, 1, 5, 8])
def test_the_value_of_binary_rewards_in_closed_form(beta: float, correct: int) -> None:
    rewards = (torch.arange(8) < correct).double()[None]
    wanted = beta * math.log(1 + correct / 8 * (math.exp(1 / beta) - 1))
    assert float(optimal_value(rewards, beta=beta)) == pytest.approx(wanted, abs=1e-12)


def test_the_limits_of_the_value_are_mean_and_maximum() -> None:
    rewards = random(5, 8, seed=1)
    torch.testing.assert_close(optimal_value(rewards, beta=1e6), optimal_value(rewards, mode="mean"), rtol=0, atol=1e-5)
    torch.testing.assert_close(optimal_value(rewards, beta=1e-6), optimal_value(rewards, mode="max"), rtol=0, atol=1e-5)
    close(optimal_value(torch.full((1, 8), 0.7).double(), beta=1e-3), torch.tensor([0.7]).double())
    close(optimal_value(torch.zeros(1, 8), beta=0.5), torch.zeros(1).double())


def test_the_estimated_value_is_too_low_on_average() -> None:
    # p = 1/4, N = 8, beta = 1/2: E over the binomial .438 against V* = .477.
    p, count, beta = 0.25, 8, 0.5
    values = optimal_value((torch.arange(8) < torch.arange(9)[:, None]).double(), beta=beta)
    weights = [math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(count + 1)]
    mean = sum(weight * float(value) for weight, value in zip(weights, values, strict=True))
    assert mean == pytest.approx(0.438, abs=5e-4)
    assert beta * math.log(1 - p + p * math.exp(1 / beta)) == pytest.approx(0.477, abs=5e-4)


def test_a_temperature_of_zero_is_refused_because_code_disagrees_about_it() -> None:
    with pytest.raises(ConfigError) as error:
        optimal_value(torch.zeros(1, 2), beta=0.0)
    assert str(error.value) == (
        "optimal_value.beta must be > 0 and finite, got 0.0; "
        "its limits are modes of their own: max (0) and mean (infinity)"
    )
    with pytest.raises(SchemaError) as shape:
        optimal_value(torch.zeros(2))
    assert str(shape.value) == "rewards must have the shape [B, N] with N >= 1, got [2]; stack them"
    with pytest.raises(ConfigError) as mode:
        optimal_value(torch.zeros(1, 2), mode="median")  # type: ignore[arg-type]
    assert str(mode.value) == "optimal_value.mode must be one of soft, mean, max, got 'median'; soft is the paper's"
