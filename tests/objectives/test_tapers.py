"""Each taper's potential is the antiderivative of its weight in the log ratio, and its special cases are
what they say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrl.errors import ConfigError
from distrl.objectives.tapers import Mask, PPOClip, Shape, SignedTruncate, Truncate
from tests.objectives.tabular import close, random

SHAPES: list[Shape] = [
    Truncate(0.0, math.inf),
    Truncate(1.0, 1.0),
    Truncate(0.0, 2.0),
    Truncate(0.3, 1.7),
    SignedTruncate(),
    SignedTruncate(0.2, 1.5, 0.4, 3.0),
    SignedTruncate(0.0, math.inf, 0.0, 1.0),
    PPOClip(0.2, 0.2),
    PPOClip(0.2, 0.28),
    PPOClip(1.0, 5.0),
    PPOClip(0.2, 0.28, 3.0),
    Mask(0.5, 5.0),
    Mask(0.0, 1.5),
]


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_the_potential_changes_with_the_log_ratio_as_fast_as_the_weight(shape: Shape) -> None:
    log_ratio = (2 * random(2000, seed=1)).requires_grad_()
    credit = random(2000, seed=2)
    (slope,) = torch.autograd.grad(shape.potential(log_ratio, credit).sum(), log_ratio)
    close(slope, shape.weight(log_ratio.detach(), credit))


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_the_potential_has_no_jump(shape: Shape) -> None:
    # With steps of 1e-5 and weights below e^3, neighbors differ by less than 3e-4.
    log_ratio = torch.linspace(-3, 3, 600_001, dtype=torch.float64)
    for sign in (1.0, -1.0):
        potential = shape.potential(log_ratio, torch.full_like(log_ratio, sign))
        assert potential.diff().abs().max() < 3e-4


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_the_weight_of_an_unchanged_policy_is_one(shape: Shape) -> None:
    close(shape.weight(torch.zeros(2).double(), torch.tensor([1.0, -1.0])), torch.ones(2).double())


@pytest.mark.parametrize(
    ("shape", "ratio", "credit", "weight", "at_bound"),
    [
        (SignedTruncate(), 0.3, 1.0, 1.0, False),  # a good response counts fully, and no bound did that
        (SignedTruncate(), 4.0, 1.0, 1.0, False),
        (SignedTruncate(), 0.3, -1.0, 0.3, False),
        (SignedTruncate(), 4.0, -1.0, 1.0, True),
        (Truncate(0.0, 2.0), 4.0, 1.0, 2.0, True),
        (Truncate(0.5, 2.0), 0.1, 1.0, 0.5, True),
        (PPOClip(0.2, 0.28), 1.27, 1.0, 1.27, False),
        (PPOClip(0.2, 0.28), 1.29, 1.0, 0.0, True),
        (PPOClip(0.2, 0.28), 0.1, 1.0, 0.1, False),
        (PPOClip(0.2, 0.28), 0.79, -1.0, 0.0, True),
        (PPOClip(0.2, 0.28), 9.0, -1.0, 9.0, False),
        (PPOClip(0.2, 0.28, 3.0), 2.9, -1.0, 2.9, False),
        (PPOClip(0.2, 0.28, 3.0), 3.1, -1.0, 0.0, True),
        (PPOClip(0.2, 0.28, 3.0), 0.1, 1.0, 0.1, False),
        (Mask(0.5, 5.0), 0.5001, 1.0, 0.5001, False),
        (Mask(0.5, 5.0), 0.4999, 1.0, 0.0, True),
        (Mask(0.5, 5.0), 4.99, -1.0, 4.99, False),
        (Mask(0.5, 5.0), 5.01, -1.0, 0.0, True),
    ],
)
def test_weight_in_each_region(shape: Shape, ratio: float, credit: float, weight: float, at_bound: bool) -> None:
    log_ratio = torch.tensor(ratio, dtype=torch.float64).log()
    sign = torch.tensor(credit, dtype=torch.float64)
    close(shape.weight(log_ratio, sign), torch.tensor(weight, dtype=torch.float64))
    assert bool(shape.at_bound(log_ratio, sign)) is at_bound


def test_the_potential_of_ppo_is_the_clipped_surrogate() -> None:
    ratio = random(1000, seed=3).exp()
    credit = random(1000, seed=4)
    surrogate = torch.minimum(ratio * credit, ratio.clamp(0.8, 1.28) * credit)
    close(credit * PPOClip(0.2, 0.28).potential(ratio.log(), credit), surrogate)


bounds = st.tuples(st.floats(0.0, 1.0), st.floats(1.0, 50.0))


@given(plus=bounds, minus=bounds, log_ratio=st.floats(-20.0, 20.0), credit=st.floats(-3.0, 3.0))
@settings(max_examples=200, deadline=None)
def test_any_intervals_around_one_bound_the_weight_and_keep_its_order(
    plus: tuple[float, float], minus: tuple[float, float], log_ratio: float, credit: float
) -> None:
    shape = SignedTruncate(*plus, *minus)
    low, high = plus if credit >= 0 else minus
    x = torch.tensor([log_ratio, log_ratio + 0.1, 0.0], dtype=torch.float64)
    weight = shape.weight(x, torch.full_like(x, credit))
    assert low * (1 - 1e-12) <= float(weight[0]) <= float(weight[1]) <= high * (1 + 1e-12)
    assert float(weight[2]) == pytest.approx(1.0)
    assert float(weight[0]) == pytest.approx(min(max(math.exp(log_ratio), low), high), rel=1e-12)
    # The slope of H between two points lies between their weights.
    potential = shape.potential(x, torch.full_like(x, credit))
    slope = float(potential[1] - potential[0]) / 0.1
    assert float(weight[0]) * (1 - 1e-6) - 1e-9 <= slope <= float(weight[1]) * (1 + 1e-6) + 1e-9


def test_an_empty_interval_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        SignedTruncate(a_minus=2.0)
    assert str(error.value) == (
        "signed_truncate.a_minus must be >= 0 and <= b_minus, which must be > 0, "
        "got a_minus 2.0 and b_minus 1.0; "
        "canonical TOPR has a_plus 1, b_plus 1, a_minus 0, b_minus 1"
    )
