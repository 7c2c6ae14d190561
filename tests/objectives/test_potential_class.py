"""Recipes of the class potential: loss and gradient are those of E_mu[sum_t A_t H(r_t)] with A held fixed.

H is written here a second time, as each publication gives it. By enumeration of every response of one and of two
tokens, with masked positions between them. TOPR has a file of its own.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distrl.objectives import build, compute
from distrl.objectives.batch import Batch
from distrl.objectives.columns import Loglinear
from distrl.objectives.ratios import Ratio
from distrl.objectives.tapers import Truncate
from tests.objectives.tabular import (
    close,
    expected,
    gradient,
    parameters,
    random,
    responses,
    spread,
    token_logps,
)

Surrogate = Callable[[Tensor, Tensor], Tensor]


def truncated(low: float, high: float) -> Surrogate:
    def surrogate(r: Tensor, a: Tensor) -> Tensor:
        value = torch.where(r > high, high + high * (r / high).log(), r)
        return a * (torch.where(r < low, low + low * (r / low).log(), value) if low > 0 else value)

    return surrogate


def masked(low: float, high: float) -> Surrogate:
    return lambda r, a: a * r.clamp(low, high)


def clipped(low: float, high: float, dual: float = math.inf) -> Surrogate:
    def surrogate(r: Tensor, a: Tensor) -> Tensor:
        value = torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)
        return torch.where(a < 0, torch.maximum(value, dual * a), value) if dual < math.inf else value

    return surrogate


CASES: list[tuple[str, dict[str, float | str], str, Surrogate]] = [
    ("tis", {"high": 1.2}, "token", truncated(0.0, 1.2)),
    ("tis", {"low": 0.7, "high": 1.4}, "token", truncated(0.7, 1.4)),
    ("tis", {"level": "sequence", "high": 1.5}, "sequence", truncated(0.0, 1.5)),
    ("icepop", {"low": 0.6, "high": 1.3}, "token", masked(0.6, 1.3)),
    ("icepop", {"level": "sequence", "low": 0.6, "high": 1.6}, "sequence", masked(0.6, 1.6)),
    ("cispo", {"high": 1.3}, "token", truncated(0.0, 1.3)),
    ("cispo", {"low": 0.8, "high": 1.3}, "token", truncated(0.8, 1.3)),
    ("ppo", {"value_coefficient": 0.0}, "token", clipped(0.2, 0.2)),
    ("ppo", {"value_coefficient": 0.0, "dual_clip": 1.5, "clip_high": 0.3}, "token", clipped(0.2, 0.3, 1.5)),
    ("gspo", {"clip_low": 0.1, "clip_high": 0.15}, "mean", clipped(0.1, 0.15)),
    ("dapo", {"dynamic_sampling": "none"}, "token", clipped(0.2, 0.28)),
    ("grpo", {"kl_coefficient": 0.0}, "token", clipped(0.2, 0.2)),
    ("rpg", {"kl_coefficient": 0.0, "dual_clip": 1.6}, "token", clipped(0.2, 0.28, 1.6)),
    ("rpg", {"kl_coefficient": 0.0, "dual_clip": 1.6, "level": "sequence"}, "sequence", clipped(0.2, 0.28, 1.6)),
]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(("name", "options", "level", "surrogate"), CASES)
def test_the_expected_gradient_is_that_of_the_potential(
    steps: int, name: str, options: dict[str, float | str], level: str, surrogate: Surrogate
) -> None:
    logits, behavior = parameters(4, steps, seed=1), parameters(4, steps, seed=2)
    count = 4**steps
    credit = random(count, steps if level == "token" else 1, seed=3).expand(count, steps)
    tensors = responses(logits, steps, behavior_logps=behavior)
    tensors |= {"rewards": random(count, seed=4), "group": torch.zeros(count, dtype=torch.int64)}
    tensors |= {"values": spread(torch.zeros(count, steps).double())}
    log_mu = token_logps(behavior, steps).detach()
    output = expected(build(name, **options), tensors, log_mu.sum(1).exp(), spread(credit, 0.0))

    log_ratio = token_logps(logits, steps) - log_mu
    if level != "token":
        log_ratio = log_ratio.sum(1, keepdim=True) if level == "sequence" else log_ratio.mean(1, keepdim=True)
        credit = credit[:, :1]
    per_response = surrogate(log_ratio.exp(), credit).sum(1) / (steps if level == "token" else 1)
    objective = (log_mu.sum(1).exp() * per_response).sum()
    close(gradient(output.loss, logits), -gradient(objective, logits))
    assert (gradient(objective, logits).abs() > 1e-3).any()
    if name != "rpg":  # its value is that of its own forms, see test_rpg
        assert output.metrics["loss_policy"] == pytest.approx(-float(objective.detach()), abs=1e-10)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(("mode", "cap"), [("truncate", 1.4), ("mask", 1.4), ("truncate", 5.0)])
def test_decoupled_ppo_clips_around_the_proximal_policy_and_corrects_the_sampler(
    steps: int, mode: str, cap: float
) -> None:
    logits, proximal, behavior = (parameters(4, steps, seed=seed) for seed in (1, 2, 3))
    proximal = (logits + 0.4 * random(*logits.shape, seed=4)).detach()
    credit = random(4**steps, steps, seed=5)
    tensors = responses(logits, steps, proximal_logps=proximal, behavior_logps=behavior)
    tensors |= {"rewards": random(4**steps, seed=6), "group": torch.zeros(4**steps, dtype=torch.int64)}
    log_mu, log_old = token_logps(behavior, steps).detach(), token_logps(proximal, steps)
    recipe = build("decoupled_ppo", cap=cap, cap_mode=mode)
    output = expected(recipe, tensors, log_mu.sum(1).exp(), spread(credit, 0.0))
    correction = (log_old - log_mu).exp()
    correction = correction.clamp(max=cap) if mode == "truncate" else torch.where(correction <= cap, correction, 0.0)
    surrogate = correction * clipped(0.2, 0.2)((token_logps(logits, steps) - log_old).exp(), credit)
    objective = (log_mu.sum(1).exp() * surrogate.sum(1)).sum() / steps
    close(gradient(output.loss, logits), -gradient(objective, logits))
    close(output.loss, -objective)


def test_decoupled_ppo_is_ppo_where_the_proximal_policy_is_the_sampler() -> None:
    logits, behavior = parameters(4, 2, seed=1), parameters(4, 2, seed=2)
    tensors = responses(logits, 2, proximal_logps=behavior, behavior_logps=behavior)
    tensors |= {"rewards": random(16, seed=6), "group": torch.arange(16) // 4}
    log_mu = token_logps(behavior, 2).sum(1)
    decoupled = expected(build("decoupled_ppo"), tensors, log_mu.exp())
    plain = expected(build("dapo", clip_high=0.2, dynamic_sampling="none"), tensors, log_mu.exp())
    close(gradient(decoupled.loss, logits), gradient(plain.loss, logits))


def test_at_the_first_step_decoupled_ppo_is_token_importance_sampling() -> None:
    logits, behavior = parameters(4, 2, seed=1), parameters(4, 2, seed=2)
    tensors = responses(logits, 2, proximal_logps=logits, behavior_logps=behavior)
    tensors |= {"rewards": random(16, seed=6), "group": torch.arange(16) // 4}
    log_mu = token_logps(behavior, 2).sum(1)
    decoupled = expected(build("decoupled_ppo", cap=1e6), tensors, log_mu.exp())
    cispo = expected(build("cispo", high=1e6), tensors, log_mu.exp())
    close(gradient(decoupled.loss, logits), gradient(cispo.loss, logits))


def test_the_loglinear_proximal_policy_lies_between_sampler_and_policy_by_version() -> None:
    # Step 10, tokens of versions 10, 9, 8, 6: shares 0, 0, 1/2, 3/4 of the way from behavior to policy.
    tensors = {
        "mask": torch.ones(1, 4).bool(),
        "logps": torch.tensor([[-1.0, -1.0, -1.0, -1.0]], dtype=torch.float64),
        "behavior_logps": torch.tensor([[-3.0, -3.0, -3.0, -3.0]], dtype=torch.float64),
        "policy_versions": torch.tensor([[10, 9, 8, 6]]),
    }
    guess = Loglinear()(Batch.from_tensors(tensors, recipe="decoupled_ppo", step=10))
    close(guess, torch.tensor([[-3.0, -3.0, -2.0, -1.5]], dtype=torch.float64))


def test_the_loglinear_guess_takes_the_place_of_recorded_log_probabilities() -> None:
    logits, behavior = parameters(4, 2, seed=1), parameters(4, 2, seed=2)
    tensors = responses(logits, 2, behavior_logps=behavior)
    tensors |= {"rewards": random(16, seed=6), "group": torch.arange(16) // 4}
    versions = torch.tensor([10, 9, 8, 6]).repeat(4)[:, None].expand(16, 5)
    share = torch.tensor([0.0, 0.0, 0.5, 0.75]).double().repeat(4)[:, None]
    recorded = tensors["behavior_logps"] + share * (tensors["logps"] - tensors["behavior_logps"]).detach()
    guessed = compute(build("decoupled_ppo", proximal="loglinear"), {**tensors, "policy_versions": versions}, step=10)
    known = compute("decoupled_ppo", {**tensors, "proximal_logps": recorded}, step=10)
    close(guessed.loss, known.loss)
    close(gradient(guessed.loss, logits), gradient(known.loss, logits))
    assert known.loss != 0


@pytest.mark.parametrize(("level", "biased"), [("token", True), ("prefix", True), ("sequence", False)])
def test_only_the_full_product_is_unbiased_for_rewards_of_whole_responses(level: str, biased: bool) -> None:
    logits, behavior = parameters(3, 2, seed=1), parameters(3, 2, seed=2)
    rewards = random(9, seed=3)
    tensors = responses(logits, 2, behavior_logps=behavior) | {"rewards": rewards}
    log_mu, log_pi = token_logps(behavior, 2).sum(1), token_logps(logits, 2).sum(1)
    exact = build("is")
    weight = Ratio(Truncate(0.0, math.inf), level)  # type: ignore[arg-type]
    recipe = replace(exact, terms=(replace(exact.terms[0], weights=(weight,)),))
    slope = gradient(expected(recipe, tensors, log_mu.exp()).loss, logits)
    wanted = -gradient((log_pi.exp() * rewards).sum(), logits)
    assert bool((slope - wanted).abs().max() > 1e-2) is biased
    if not biased:
        close(slope, wanted)
