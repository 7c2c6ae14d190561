"""pass@k and its intervals, against enumeration of what they estimate."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from distrl.passk import Estimate, accuracy, effective_responses, mean_pass_at_k, pass_at_k, wilson
from tests.builders import refusal


@pytest.mark.parametrize("responses", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response(responses: int) -> None:
    for correct, k in itertools.product(range(responses + 1), range(1, responses + 1)):
        marks = [True] * correct + [False] * (responses - correct)
        subsets = list(itertools.combinations(marks, k))
        assert pass_at_k(responses, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_pass_at_k_is_unbiased(p: float) -> None:
    responses = 6
    for k in range(1, responses + 1):
        chances = [math.comb(responses, c) * p**c * (1 - p) ** (responses - c) for c in range(responses + 1)]
        expected = sum(chance * pass_at_k(responses, c, k) for c, chance in enumerate(chances))
        assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_is_exact_with_many_responses() -> None:
    # One correct among n is in a subset of k with probability k / n.
    assert pass_at_k(10_000, 1, 5_000) == 0.5
    assert pass_at_k(10_000, 9_999, 1) == pytest.approx(0.9999, abs=1e-15)


@pytest.mark.parametrize(("responses", "correct", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_what_no_responses_can_estimate_is_refused(responses: int, correct: int, k: int) -> None:
    assert refusal(ValueError, lambda: pass_at_k(responses, correct, k)) == (
        "pass@k needs 1 <= k <= responses and 0 <= correct <= responses, "
        f"got k {k}, responses {responses}, correct {correct}"
    )


@pytest.mark.parametrize(("correct", "number"), [(0, 10), (3, 10), (50, 100), (999, 1000), (7, 7)])
def test_the_ends_of_wilsons_interval_are_where_the_score_test_just_rejects(correct: int, number: int) -> None:
    found = wilson(correct / number, number)
    for end in (found.low, found.high):
        if 0 < end < 1:
            score = abs(found.value - end) / math.sqrt(end * (1 - end) / number)
            assert score == pytest.approx(1.959963984540054, rel=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


@pytest.mark.parametrize(("p", "number"), [(0.1, 40), (0.5, 25), (0.7, 100)])
def test_wilsons_interval_covers_the_truth_about_as_often_as_it_says(p: float, number: int) -> None:
    coverage = 0.0
    for correct in range(number + 1):
        found = wilson(correct / number, number)
        if found.low <= p <= found.high:
            coverage += math.comb(number, correct) * p**correct * (1 - p) ** (number - correct)
    assert 0.93 < coverage < 0.98


@pytest.mark.parametrize(
    ("responses", "correct", "expected"),
    [
        (1, [0, 1, 1, 0, 1], 5),  # one response each: all are independent
        (4, [0, 4, 4, 0, 4], 5),  # the responses to a problem agree: they tell no more than one
        (2, [1, 1, 1], 6),  # no spread between problems: at most all responses
        (4, [0, 0, 0], 3),
        (4, [4, 4], 2),
        # Shares 1/4 and 3/4: p (1 - p) = 1/4 over Var(p) = (1/16) / 2.
        (4, [1, 3], 8),
    ],
)
def test_responses_to_one_problem_count_by_how_much_they_tell(
    responses: int, correct: Sequence[int], expected: float
) -> None:
    assert effective_responses(responses, correct) == pytest.approx(expected, abs=1e-12)
    share = sum(correct) / (responses * len(correct))
    assert accuracy(responses, correct) == wilson(share, effective_responses(responses, correct))


def test_the_bootstrap_has_the_distribution_of_problems_drawn_one_by_one() -> None:
    responses, k = 4, 2
    correct = [0, 1, 1, 4]
    values = [pass_at_k(responses, c, k) for c in correct]
    # All 4^4 resamples, equally likely: the exact bootstrap distribution.
    means = np.array([np.mean(sample) for sample in itertools.product(values, repeat=len(values))])
    found = mean_pass_at_k(responses, correct, k, seed=0, draws=20_000)
    assert found.value == pytest.approx(np.mean(values))
    # A quantile of a discrete distribution: accepted is the exact one or its neighbor.
    steps = np.unique(means.round(12))
    for end, q in ((found.low, 0.025), (found.high, 0.975)):
        exact = np.searchsorted(steps, np.quantile(means, q) - 1e-9)
        assert abs(int(np.abs(steps - end).argmin()) - int(exact)) <= 1


def test_the_bootstraps_interval_approaches_the_normal_one() -> None:
    rng = np.random.default_rng(1)
    correct = [int(c) for c in rng.binomial(8, rng.uniform(size=2000))]
    values = np.array([pass_at_k(8, c, 4) for c in correct])
    error = values.std() / math.sqrt(len(values))
    found = mean_pass_at_k(8, correct, 4, seed=3)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_the_same_seed_gives_the_same_interval_and_order_does_not_matter() -> None:
    correct = [i % 8 for i in range(100)]
    first = mean_pass_at_k(7, correct, 2, seed=5)
    assert mean_pass_at_k(7, correct[::-1], 2, seed=5) == first
    assert mean_pass_at_k(7, correct, 2, seed=6) != first


def test_without_spread_the_bootstrap_has_no_width() -> None:
    assert mean_pass_at_k(4, [4, 4], 2, seed=0) == Estimate(1.0, 1.0, 1.0)
