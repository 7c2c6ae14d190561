"""Recipes of the class policy: the expected gradient is that of the stated objective under the policy.

By enumeration of every response, or every group, of one and of two tokens, with masked positions between them.
"""

import pytest
import torch
from torch import Tensor

from distrl.objectives import build
from tests.objectives.tabular import (
    all_groups,
    close,
    expected,
    gradient,
    group_probability,
    parameters,
    random,
    responses,
    sequence_kl,
    sequence_logps,
)

each_length = pytest.mark.parametrize("steps", [1, 2])
SYMBOLS = {1: 3, 2: 2}


def game(count: int, seed: int) -> Tensor:
    """[count, count] probability that the row's response beats the column's."""
    return random(count, count, seed=seed).triu(1).sub(random(count, count, seed=seed).triu(1).T).sigmoid()


@each_length
def test_reinforce_is_the_policy_gradient_where_the_sampler_is_the_policy(steps: int) -> None:
    logits = parameters(3, steps, seed=1)
    rewards = random(3**steps, seed=2)
    log_pi = sequence_logps(logits, steps)
    output = expected(build("reinforce"), {**responses(logits, steps), "rewards": rewards}, log_pi.exp())
    close(gradient(output.loss, logits), -gradient((log_pi.exp() * rewards).sum(), logits))


@each_length
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_is_is_the_policy_gradient_under_any_sampler(steps: int, beta: float, baseline: float) -> None:
    logits, behavior, reference = (parameters(3, steps, seed=seed) for seed in (1, 2, 3))
    rewards = random(3**steps, seed=4)
    tensors = responses(logits, steps, behavior_logps=behavior, ref_logps=reference)
    recipe = build("is", baseline=baseline, kl_coefficient=beta)
    log_mu, log_pi = sequence_logps(behavior, steps), sequence_logps(logits, steps)
    slope = gradient(expected(recipe, {**tensors, "rewards": rewards}, log_mu.exp()).loss, logits)
    objective = (log_pi.exp() * rewards).sum() - beta * sequence_kl(logits, reference, steps)
    close(slope, -gradient(objective, logits))


@each_length
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_is_the_policy_gradient_in_expectation_over_groups(steps: int, size: int, beta: float) -> None:
    symbols = SYMBOLS[steps]
    logits, reference = parameters(symbols, steps, seed=1), parameters(symbols, steps, seed=2)
    rewards = random(symbols**steps, seed=3)
    rows, group = all_groups(symbols**steps, size)
    log_pi = sequence_logps(logits, steps)
    tensors = responses(logits, steps, rows=rows, ref_logps=reference) | {"rewards": rewards[rows], "group": group}
    output = expected(build("rloo", kl_coefficient=beta), tensors, group_probability(log_pi, rows, size))
    objective = (log_pi.exp() * rewards).sum() - beta * sequence_kl(logits, reference, steps)
    close(gradient(output.loss, logits), -gradient(objective, logits))


@each_length
@pytest.mark.parametrize("baseline", ["leave_one_out", "half"])
@pytest.mark.parametrize("importance", ["sequence", "none"])
@pytest.mark.parametrize(
    ("name", "beta", "prox"), [("nash_mp", 0.2, 0.5), ("nash_mp", 0.1, 0.0), ("nash_md", 0.2, 0.0)]
)
def test_nash_recipes_ascend_the_regularized_game_at_a_fixed_opponent(
    steps: int, baseline: str, importance: str, name: str, beta: float, prox: float
) -> None:
    symbols = SYMBOLS[steps]
    logits, behavior, reference, anchor, opponent = (parameters(symbols, steps, seed=seed) for seed in range(1, 6))
    sampler = behavior if importance == "sequence" else logits
    wins = game(symbols**steps, seed=6) @ sequence_logps(opponent, steps).detach().exp()
    rows, group = all_groups(symbols**steps, 2)
    tensors = responses(logits, steps, rows=rows, behavior_logps=sampler, ref_logps=reference, anchor_logps=anchor)
    tensors |= {"preference": wins[rows], "group": group}
    options = {"beta": beta, "prox": prox} if name == "nash_mp" else {"tau": beta}
    recipe = build(name, baseline=baseline, importance=importance, **options)
    output = expected(recipe, tensors, group_probability(sequence_logps(sampler, steps), rows, 2))
    objective = (sequence_logps(logits, steps).exp() * wins).sum()
    objective = objective - beta * sequence_kl(logits, reference, steps) - prox * sequence_kl(logits, anchor, steps)
    close(gradient(output.loss, logits), -gradient(objective, logits))


@each_length
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_online_ipo_is_the_gradient_of_self_play(steps: int, tau: float) -> None:
    # Munos et al.'s objective at the opponent sg(pi), times 4 / tau, over ordered pairs.
    logits, reference = parameters(2, steps, seed=1), parameters(2, steps, seed=2)
    count = 2**steps
    matrix = game(count, seed=3)
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    log_pi = sequence_logps(logits, steps)
    tensors = responses(logits, steps, ref_logps=reference)
    tensors |= {"pairs": pairs, "pair_preference": matrix[pairs[:, 0], pairs[:, 1]]}
    output = expected(build("online_ipo", tau=tau), tensors, log_pi[pairs].sum(1).exp())
    self_play = (log_pi.exp() * (matrix @ log_pi.detach().exp())).sum() - tau * sequence_kl(logits, reference, steps)
    close(gradient(output.loss, logits), -4.0 / tau * gradient(self_play, logits))


def test_online_ipo_stands_still_at_the_nash_equilibrium() -> None:
    # pi*(y) = ref(y) exp(P(y beats pi*) / tau) / Z by fixed-point iteration, which contracts for large tau.
    matrix, reference, tau = game(4, seed=3), parameters(4, 1, seed=2), 1.0
    log_pi = reference.detach().log_softmax(1)[0]
    for _ in range(200):
        log_pi = (reference.detach().log_softmax(1)[0] + matrix @ log_pi.exp() / tau).log_softmax(0)
    logits = log_pi[None].requires_grad_()
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    tensors = responses(logits, 1, ref_logps=reference)
    tensors |= {"pairs": pairs, "pair_preference": matrix[pairs[:, 0], pairs[:, 1]]}
    output = expected(build("online_ipo", tau=tau), tensors, log_pi.detach()[pairs].sum(1).exp())
    close(gradient(output.loss, logits), torch.zeros_like(logits))


def test_the_kl_of_the_same_token_only_is_biased_on_every_token_but_the_last() -> None:
    # What nash_md's return to go is for: with the return `now` early tokens miss their effect on the KL of later
    # ones. The last token's gradient is right either way.
    logits, reference = parameters(3, 2, seed=1), parameters(3, 2, seed=2)
    log_pi = sequence_logps(logits, 2)
    tokens = token_difference = responses(logits, 2, ref_logps=reference)
    away = torch.where(tokens["mask"], tokens["logps"] - token_difference["ref_logps"], 0.0)
    same_token = (torch.where(tokens["mask"], tokens["logps"], 0.0) * away.detach()).sum(1)
    biased = gradient((log_pi.exp().detach() * same_token).sum(), logits)
    right = gradient(sequence_kl(logits, reference, 2), logits)
    close(biased[1:], right[1:])
    assert (biased[0] - right[0]).abs().max() > 1e-3
