"""GRPO, by enumeration of whole groups on-policy, and its pieces by a second route."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from distrl.objectives import build, compute
from distrl.objectives.batch import Batch
from distrl.objectives.evaluate import prepare
from tests.objectives.tabular import close, expected, gradient, parameters, random, token_logps


def grpo_gradient(logits: Tensor, rewards: Tensor, size: int) -> Tensor:
    """Expected gradient of the loss over every group of `size` arms drawn from pi."""
    groups = torch.tensor(list(itertools.product(range(len(rewards)), repeat=size)))
    logps = token_logps(logits, 1)[groups.flatten()]
    probability = logps.detach().exp().reshape(-1, size).prod(1).repeat_interleave(size) / size
    tensors = {
        "logps": logps,
        "behavior_logps": logps.detach(),
        "mask": torch.ones_like(logps, dtype=torch.bool),
        "rewards": rewards[groups.flatten()],
        "group": torch.arange(len(groups)).repeat_interleave(size),
    }
    return gradient(expected(build("grpo", epsilon=0.0, kl_coefficient=0.0), tensors, probability).loss, logits)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("rewards", [(1.0, 0.0, 0.0), (0.0, 1.0, 1.0)])
def test_with_binary_rewards_it_is_the_accuracy_gradient_times_a_known_factor(
    size: int, rewards: tuple[float, ...]
) -> None:
    # grad p * E_{K ~ Bin(G, p)} sqrt(K/G (1 - K/G)) / (p (1 - p)), population standard deviation, epsilon 0.
    logits = parameters(3, 1, seed=7)
    reward = torch.tensor(rewards, dtype=torch.float64)
    accuracy = (logits.softmax(1)[0] * reward).sum()
    p = float(accuracy.detach())
    spread = sum(
        math.comb(size, k) * p**k * (1 - p) ** (size - k) * math.sqrt(k / size * (1 - k / size))
        for k in range(size + 1)
    )
    close(grpo_gradient(logits, reward, size), -gradient(accuracy, logits) * spread / (p * (1 - p)))


@pytest.mark.parametrize("size", [2, 3])
def test_with_real_rewards_it_is_an_independent_loop_over_groups(size: int) -> None:
    logits, rewards = parameters(3, 1, seed=8), random(3, seed=9)
    logps = token_logps(logits, 1)[:, 0]
    total = torch.zeros_like(logits)
    for group in itertools.product(range(3), repeat=size):
        values = [float(rewards[arm]) for arm in group]
        mean = sum(values) / size
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / size)
        if len(set(group)) > 1:
            probability = math.prod(float(logps[arm].detach().exp()) for arm in group)
            for arm, value in zip(group, values, strict=True):
                total -= probability * (value - mean) / deviation / size * gradient(logps[arm], logits)
    close(grpo_gradient(logits, rewards, size), total)


def credits(rewards: list[float], group: list[int], **options: float) -> list[float]:
    batch = Batch.from_tensors(
        {
            "mask": torch.ones(len(group), 2).bool(),
            "rewards": torch.tensor(rewards),
            "group": torch.tensor(group),
        },
        recipe="grpo",
    )
    return prepare(build("grpo", kl_coefficient=0.0, **options), batch).credit[:, 0].tolist()


def test_binary_credits_are_the_odds_of_the_group() -> None:
    # k = 1 of G = 4: p = 1/4, A+ = sqrt((1 - p) / p) = sqrt 3, A- = -sqrt(p / (1 - p)) = -1 / sqrt 3.
    low = -1 / math.sqrt(3)
    assert credits([0, 1, 0, 0], [5, 5, 5, 5], epsilon=0.0) == pytest.approx([low, math.sqrt(3), low, low])


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0 / 3.0, 1e9])
def test_a_group_of_equal_rewards_has_credit_exactly_zero(epsilon: float, value: float) -> None:
    assert credits([value] * 3, [1, 1, 1], epsilon=epsilon) == [0.0, 0.0, 0.0]


def test_epsilon_is_added_to_the_deviation() -> None:
    # Rewards 0 and 2: mean 1, population deviation 1, so the credit is 1 / (1 + 0.25).
    assert credits([0.0, 2.0], [3, 3], epsilon=0.25) == pytest.approx([-0.8, 0.8])


def test_groups_are_found_whatever_their_order() -> None:
    apart = credits([0, 1, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1])
    mixed = credits([0, 1, 1, 1, 0, 1], [9, 2, 9, 2, 9, 2])
    assert mixed == pytest.approx([apart[0], 0.0, apart[1], 0.0, apart[2], 0.0])


def test_loss_is_the_clipped_surrogate_with_each_response_weighing_the_same() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], [1, 0, 0, 0]]).bool()
    behavior = -random(4, 4, seed=1).exp()
    logps = (behavior + 0.3 * random(4, 4, seed=2)).requires_grad_()
    reference = behavior + 0.2 * random(4, 4, seed=3)
    tensors = {
        "logps": logps,
        "behavior_logps": behavior,
        "ref_logps": reference,
        "mask": mask,
        "rewards": torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64),
        "group": torch.tensor([0, 0, 1, 1]),
    }
    output = compute(build("grpo", epsilon=0.0, kl_coefficient=0.04), tensors)

    # A group of two has credits +-1. Each token by hand: -min(r A, clip(r) A) + beta (e^-l - 1 + l).
    total = torch.zeros((), dtype=torch.float64)
    for i, credit in enumerate([1.0, -1.0, 1.0, -1.0]):
        tokens = []
        for t in range(4):
            if mask[i, t]:
                ratio = (logps[i, t] - behavior[i, t]).exp()
                away = logps[i, t] - reference[i, t]
                surrogate = torch.minimum(ratio * credit, ratio.clamp(0.8, 1.2) * credit)
                tokens.append(-surrogate + 0.04 * ((-away).exp() - 1 + away))
        total = total + sum(tokens) / len(tokens) / 4
    close(output.loss, total)
    close(gradient(output.loss, logps), gradient(total, logps))
