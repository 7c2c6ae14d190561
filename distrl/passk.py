"""Accuracy and pass@k from several graded responses per problem, with intervals. Plain functions, numbers in and out.

Responses to one problem share its difficulty, so problems are what is drawn independently: the interval of the accuracy
counts effective responses, and the bootstrap draws problems.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value in [0, 1] with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def pass_at_k(responses: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k responses is correct.

        1 - C(n - c, k) / C(n, k),  n = responses, c = correct

    Eq. 1 of Chen et al. 2021 (arXiv:2107.03374): the fraction of the k-subsets of the n responses that hold a correct
    one. Equals c / n at k = 1.

    Raises:
        ValueError: not 1 <= k <= responses, or not 0 <= correct <= responses.
    """
    if not 1 <= k <= responses or not 0 <= correct <= responses:
        raise ValueError(
            f"pass@k needs 1 <= k <= responses and 0 <= correct <= responses, got k {k}, responses {responses}, "
            f"correct {correct}"
        )
    # Integers of any size: the quotient is rounded once.
    return 1.0 - math.comb(responses - correct, k) / math.comb(responses, k)


def wilson(share: float, number: float, z: float = Z95) -> Estimate:
    """Wilson's score interval of a binomial proportion; never empty, never beyond [0, 1].

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Args:
        share: p, observed.
        number: n > 0, independent draws; need not be whole.
    """
    center = share + z * z / (2 * number)
    spread = z * math.sqrt(share * (1 - share) / number + (z / (2 * number)) ** 2)
    scale = 1 + z * z / number
    # Rounding must not exclude the value itself at 0 and 1.
    low, high = min(share, (center - spread) / scale), max(share, (center + spread) / scale)
    return Estimate(share, max(0.0, low), min(1.0, high))


def effective_responses(responses: int, correct: Sequence[int]) -> float:
    """How many independent responses tell as much about the accuracy as these.

        n_eff = p (1 - p) / Var(p),  Var(p) = (1/P^2) sum_i (c_i / n - p)^2

    over P problems with n responses each: the number of problems where all responses to a problem agree, more where
    they differ, at most all responses. With one response per problem it is exactly the number of problems, and so it
    is where every response is right or every one is wrong, since nothing is known of the spread then.
    """
    problems = len(correct)
    shares = np.asarray(correct, float) / responses
    share = float(shares.mean())
    variance = float(shares.var()) / problems
    if share in (0.0, 1.0):
        return float(problems)
    most = float(problems * responses)
    return most if variance == 0.0 else min(most, max(float(problems), share * (1 - share) / variance))


def accuracy(responses: int, correct: Sequence[int]) -> Estimate:
    """The share of correct responses with Wilson's interval over the effective responses.

    Args:
        responses: n >= 1 per problem.
        correct: by problem, at least one problem.
    """
    share = sum(correct) / (responses * len(correct))
    return wilson(share, effective_responses(responses, correct))


def mean_pass_at_k(responses: int, correct: Sequence[int], k: int, *, seed: int, draws: int = 2000) -> Estimate:
    """The mean of `pass_at_k` over problems, with the percentile interval of a bootstrap that draws problems.

    Where all problems have the same value the interval has no width: a bootstrap knows only what it has seen.

    Args:
        correct: by problem, at least one problem.
        seed: >= 0; the same seed draws the same problems for every k.
        draws: resamples, each of as many problems.
    """
    values = np.array([pass_at_k(responses, c, k) for c in correct])
    # How often each distinct value occurs in a resample is multinomial; problems need not be drawn one by one.
    distinct, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(seed)
    means = rng.multinomial(len(values), counts / len(values), size=draws) @ distinct / len(values)
    low, high = np.quantile(means, (0.025, 0.975))
    value = float(counts @ distinct) / len(values)
    return Estimate(value, min(value, float(low)), max(value, float(high)))
