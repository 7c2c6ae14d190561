"""Anchors: mixtures of models, models that move, and what a reset leaves."""

import pytest
import torch

from distrl.errors import ConfigError
from distrl.objectives import Batch, build, compute
from distrl.objectives.columns import Penalty
from distrl.objectives.schedules import Fixed
from distrl.objectives.upkeep import EMA, Frozen, Mixture, Reset, Snapshot, Upkeep
from tests.objectives.tabular import close
from tests.objectives.test_invariance import example


def test_two_penalties_are_one_towards_the_mixture() -> None:
    # b log(pi/ref) + c log(pi/anc) = (b + c) log(pi / ref^(b/(b+c)) anc^(c/(b+c))): Nash-MP's half step.
    batch = Batch.from_tensors(example(), recipe="nash_mp")
    b, c = 0.2, 0.5
    apart = Penalty(Fixed(b))(batch) + Penalty(Fixed(c), {"anchor": 1.0})(batch)
    mixed = Penalty(Fixed(b + c), {"reference": b / (b + c), "anchor": c / (b + c)})(batch)
    close(apart, mixed)


def test_an_anchor_may_hold_the_policy_whose_gradient_it_carries() -> None:
    tensors = example()
    logps = tensors["logps"].requires_grad_()
    batch = Batch.from_tensors(tensors, recipe="test")
    mixed = batch.log({"policy": 0.25, "reference": 0.75})
    close(mixed, torch.where(batch.mask, 0.25 * logps + 0.75 * tensors["ref_logps"], 0.0))
    close(torch.autograd.grad(mixed.sum(), logps)[0], 0.25 * batch.mask.double())


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_right_after_a_reset_the_kl_and_its_gradient_are_zero(estimator: str) -> None:
    tensors = example()
    tensors["ref_logps"] = tensors["logps"].clone()
    slopes = []
    for options in ({"kl_coefficient": 0.1, "kl_estimator": estimator}, {}):
        logps = tensors["logps"].clone().requires_grad_()
        output = compute(build("dapo", **options), {**tensors, "logps": logps})
        assert output.metrics.get("loss_kl", 0.0) == 0.0
        slopes.append(torch.autograd.grad(output.loss, logps)[0])
    close(slopes[0], slopes[1])


@pytest.mark.parametrize(
    ("how", "text"),
    [
        (Frozen(), "frozen at the start of the run"),
        (EMA(0.05), "moving average of the policy's weights, 0.05 of the new ones after every step"),
        (Snapshot(20.0), "copy of the policy, renewed every 20 steps"),
        (Reset(500.0), "copy of the policy, renewed every 500 steps together with the optimizer's state"),
        (Mixture(0.125), "samples from policy^0.875 reference^0.125, mixed token by token"),
    ],
)
def test_upkeep_says_what_the_system_does(how: Upkeep, text: str) -> None:
    assert how.describe() == text


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        (
            "nash_mp",
            {"ema_rate": 1.5},
            "ema.rate must be in [0, 1], got 1.5; it is the share of the new policy",
        ),
        (
            "nash_mp",
            {"target": "snapshot", "snapshot_every": 1.5},
            "snapshot.every must be a whole number >= 1 of optimizer steps, got 1.5; choose one",
        ),
        (
            "dapo",
            {"kl_coefficient": 0.1, "reference": "reset", "reference_every": 2.5},
            "reset.every must be a whole number >= 1 of optimizer steps, got 2.5; choose one",
        ),
        ("nash_md", {"mixture": 2.0}, "mixture.share must be in [0, 1], got 2.0; 0 is the policy itself"),
        ("online_ipo", {"tau": 0.0}, "ipo.tau must be > 0, got 0.0; it is the strength of the KL to the anchor"),
        (
            "icepop",
            {"low": 1.5},
            "mask.low must be in [0, 1] and mask.high >= 1, got low 1.5 and high 5.0; "
            "else an unchanged policy would learn nothing: 0.5 and 5 are usual",
        ),
        (
            "grpo",
            {"kl_rows": "full", "kl_top_k": 2.5},
            "full_divergence.top_k must be a whole number >= 0 of symbols, got 2.5; 0 compares all",
        ),
        ("ppo", {"dual_clip": 1.0}, "ppo_clip.dual must be > 1, got 1.0; 3 is usual, .inf turns it off"),
        (
            "dapo",
            {"overlong_max_length": 100.0},
            "overlong.cache must be > 0 and <= overlong.max_length, got cache 4096.0 and max_length 100.0; "
            "the paper has 4096 of 20480 tokens",
        ),
    ],
)
def test_a_constant_out_of_range_is_refused(name: str, options: dict[str, float | str], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(name, **options)
    assert str(error.value) == text
