"""Recipes of the class group: expectations over whole groups, and loops over every group, written a second time."""

import math

import pytest
import torch
from torch import Tensor

from distrl.objectives import Batch, build, compute, prepare
from distrl.objectives.columns import Overlong
from tests.objectives.tabular import (
    all_groups,
    close,
    expected,
    gradient,
    group_probability,
    parameters,
    random,
    responses,
    sequence_logps,
    token_logps,
)

SYMBOLS = {1: 3, 2: 2}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("size", [2, 3])
def test_dr_grpo_is_the_policy_gradient_times_one_less_than_the_group(steps: int, size: int) -> None:
    symbols = SYMBOLS[steps]
    logits, rewards = parameters(symbols, steps, seed=1), random(symbols**steps, seed=2)
    rows, group = all_groups(symbols**steps, size)
    tensors = responses(logits, steps, rows=rows, behavior_logps=logits) | {"rewards": rewards[rows], "group": group}
    log_pi = sequence_logps(logits, steps)
    output = expected(build("dr_grpo", max_length=7.0), tensors, group_probability(log_pi, rows, size))
    wanted = -(size - 1) / size / 7.0 * gradient((log_pi.exp() * rewards).sum(), logits)
    close(gradient(output.loss, logits), wanted)


def surrogate(ratio: Tensor, credit: float, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * credit, ratio.clamp(1 - low, 1 + high) * credit)


def off_policy(size: int, steps: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Every group of `size` responses of two symbols, under a policy that moved a little from its sampler."""
    logits = parameters(2, steps, seed=1)
    behavior = (logits + 0.4 * random(*logits.shape, seed=2)).detach()
    reference = parameters(2, steps, seed=3)
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.3], dtype=torch.float64)
    rows, group = all_groups(2**steps, size)
    tensors = responses(logits, steps, rows=rows, behavior_logps=behavior, ref_logps=reference)
    tensors |= {"rewards": rewards[rows], "group": group}
    log_ratio = (token_logps(logits, steps) - token_logps(behavior, steps))[rows]
    away = (token_logps(logits, steps) - token_logps(reference, steps).detach())[rows]
    return logits, log_ratio, away, rewards[rows], group, tensors


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("filtered", [True, False])
def test_dapo_is_an_independent_loop_over_groups(size: int, filtered: bool) -> None:
    logits, log_ratio, _, rewards, group, tensors = off_policy(size)
    recipe = build("dapo", epsilon=0.0, dynamic_sampling="filter" if filtered else "none")
    output = compute(recipe, tensors)
    losses, counted = [], 0
    for number in group.unique():
        members = (group == number).nonzero()[:, 0].tolist()
        values = [float(rewards[i]) for i in members]
        mean = sum(values) / size
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / size)
        if deviation == 0.0 and filtered:
            continue
        for i in members:
            credit = (float(rewards[i]) - mean) / deviation if deviation else 0.0
            losses += [-surrogate(log_ratio[i, t].exp(), credit, 0.2, 0.28) for t in range(2)]
            counted += 2
    total = torch.stack(losses).sum() / counted
    close(output.loss, total)
    close(gradient(output.loss, logits), gradient(total, logits))


def test_the_overlong_punishment_is_linear_between_its_bounds() -> None:
    # L = 7, cache 4: 0 up to 3 tokens, -1/4 per token after that, -1 from 7 on.
    lengths = torch.tensor([0, 3, 4, 5, 6, 8, 9])
    batch = Batch.from_tensors({"mask": torch.arange(9) < lengths[:, None]}, recipe="dapo")
    wanted = torch.tensor([0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0], dtype=torch.float64)
    close(Overlong(max_length=7.0, cache=4.0)(batch), wanted)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_reinforce_pp_is_an_independent_loop(size: int, beta: float) -> None:
    logits, log_ratio, away, rewards, _, tensors = off_policy(size)
    output = compute(build("reinforce_pp", kl_coefficient=beta, epsilon=0.0), tensors)
    count = len(rewards)
    to_go = [
        [float(rewards[i]) - beta * sum(float(away[i, s].detach()) for s in range(t, 2)) for t in range(2)]
        for i in range(count)
    ]
    flat = [value for row in to_go for value in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in flat) / len(flat))
    terms = [
        -surrogate(log_ratio[i, t].exp(), (to_go[i][t] - mean) / deviation, 0.2, 0.2)
        for i in range(count)
        for t in range(2)
    ]
    total = torch.stack(terms).mean()
    close(output.loss, total)
    close(gradient(output.loss, logits), gradient(total, logits))
    if beta:
        assert output.metrics["effective_kl_coefficient"] == pytest.approx(beta / deviation)


def test_reinforce_pp_credits_have_mean_0_and_variance_1_over_tokens_but_not_per_prompt() -> None:
    tensors = off_policy(3)[-1]
    tensors["mask"][::2, 3] = False  # responses of one and of two tokens
    batch = Batch.from_tensors(tensors, recipe="reinforce_pp")
    credit = prepare(build("reinforce_pp"), batch).credit
    tokens = credit[tensors["mask"]]
    close(tokens.mean(), torch.tensor(0.0).double())
    torch.testing.assert_close(tokens.square().mean(), torch.tensor(1.0).double(), rtol=1e-6, atol=0)
    per_prompt = [float(credit[tensors["group"] == g].sum()) for g in tensors["group"].unique()]
    assert max(abs(value) for value in per_prompt) > 0.1


def test_reinforce_pp_baseline_subtracts_the_group_mean_before_whitening() -> None:
    tensors = off_policy(3)[-1]
    batch = Batch.from_tensors(tensors, recipe="reinforce_pp")
    credit = prepare(build("reinforce_pp", baseline="group_mean", epsilon=0.0), batch).credit[:, 1]
    rewards, group = tensors["rewards"], tensors["group"]
    centered = torch.stack([r - rewards[group == g].mean() for r, g in zip(rewards, group, strict=True)])
    close(credit, centered / centered.square().mean().sqrt())


def test_rloo_credit_is_the_group_mean_credit_times_g_over_g_minus_1() -> None:
    rewards, group = random(12, seed=1), torch.arange(12) % 3
    batch = Batch.from_tensors({"mask": torch.ones(12, 2).bool(), "rewards": rewards, "group": group}, recipe="x")
    left_out, mean = (prepare(build(name), batch).credit for name in ("rloo", "dr_grpo"))
    close(left_out, 4 / 3 * mean)
    first = (group == 0).nonzero()[:, 0]
    close(left_out[first[0], 0], rewards[first[0]] - rewards[first[1:]].mean())


def test_rloo_credits_every_token_with_the_kl_of_the_whole_response() -> None:
    _, _, away, rewards, group, tensors = off_policy(2)
    batch = Batch.from_tensors(tensors, recipe="rloo")
    credit = prepare(build("rloo", kl_coefficient=0.3), batch).credit[:, [1, 3]]
    total = rewards - 0.3 * away.detach().sum(1)
    other = torch.stack([total[(group == g) & (torch.arange(len(group)) != i)].sum() for i, g in enumerate(group)])
    close(credit, (total - other)[:, None].expand(-1, 2))
