"""Exact solvers of small preference games, to check learners against.

A game has n responses, preference[i, j] = P(response i beats response j) with P + P^T = 1, and a reference
policy. Both players are regularized,

    J(p, q) = P(p beats q) - beta KL(p || reference) + beta KL(q || reference)

and the only equilibrium is the fixed point p*(y) = reference(y) exp(P(y beats p*) / beta) / Z.

Every solver starts from the reference, takes eta > 0 with the effective step a = eta / (1 + eta), and returns
the policies [iterations + 1, n] in float64, the reference first.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distrl.errors import ConfigError

INNER_ITERATIONS = 10_000
"""Bound of the inner solver of `proximal_point`, which normally stops long before."""


def nash_mirror_prox(preference: Tensor, reference: Tensor, beta: float, eta: float, iterations: int) -> Tensor:
    """Two half steps per iteration, both from the same policy p_k, the second one against where the first led.

        log p' = a (log reference + P(. beats p_k) / beta) + (1 - a) log p_k + const
        log p_{k+1} = a (log reference + P(. beats p') / beta) + (1 - a) log p_k + const

    Nash-MP, Tiapkin et al. 2025 (arXiv:2505.19731). With eta = 2 beta, KL(p* || p_k) falls by at least
    1 / (1 + 2 beta) per iteration; so it does for any eta with eta / sqrt(1 + eta) <= 2 beta.

    Args:
        preference: [n, n] in [0, 1].
        reference: [n] probabilities, all > 0.
        beta: temperature of the game, > 0.
        eta: step, > 0; the paper's is 2 beta.
        iterations: how many; each asks for two sets of preferences.

    Returns:
        [iterations + 1, n]

    Raises:
        ConfigError: no such game, or a constant out of range.
    """

    def step(log_policy: Tensor, log_reference: Tensor, wins: Tensor, a: float) -> Tensor:
        half = _prox(log_policy, log_reference, wins @ log_policy.exp() / beta, a)
        return _prox(log_policy, log_reference, wins @ half.exp() / beta, a)

    return _iterate(step, preference, reference, beta, eta, iterations)


def mirror_descent(preference: Tensor, reference: Tensor, beta: float, eta: float, iterations: int) -> Tensor:
    """Self-play by mirror descent, a single half step of `nash_mirror_prox` per iteration.

    The last iterate converges only for a < 2 / (1 + w^2), w the largest frequency of the game at its
    equilibrium: a step of the order of beta^2. INPO is its sampled form (Zhang et al. 2024, arXiv:2407.00617).

    Args, Returns, Raises: see `nash_mirror_prox`.
    """

    def step(log_policy: Tensor, log_reference: Tensor, wins: Tensor, a: float) -> Tensor:
        return _prox(log_policy, log_reference, wins @ log_policy.exp() / beta, a)

    return _iterate(step, preference, reference, beta, eta, iterations)


def nash_md(preference: Tensor, reference: Tensor, beta: float, eta: float, iterations: int) -> Tensor:
    """Mirror descent from, and against, the mixture of policy and reference.

        log mix = (1 - a) log p_k + a log reference + const
        log p_{k+1} = log mix + (a / beta) P(. beats mix) + const

    Nash-MD, Munos et al. 2023 (arXiv:2312.00886), whose own step is a / beta. At a constant step it ends near
    the equilibrium and not in it: its mixture is the equilibrium at the temperature beta / (1 - a).

    Args, Returns, Raises: see `nash_mirror_prox`.
    """

    def step(log_policy: Tensor, log_reference: Tensor, wins: Tensor, a: float) -> Tensor:
        mix = ((1.0 - a) * log_policy + a * log_reference).log_softmax(0)
        return (mix + (a / beta) * (wins @ mix.exp())).log_softmax(0)

    return _iterate(step, preference, reference, beta, eta, iterations)


def proximal_point(preference: Tensor, reference: Tensor, beta: float, eta: float, iterations: int) -> Tensor:
    """The equilibrium of the game that is also regularized towards p_k, exactly, per iteration.

        p_{k+1} = equilibrium of P with beta KL(. || reference) + (beta / eta) KL(. || p_k)

    That game has the temperature beta / a and the reference reference^a p_k^(1-a). For any eta
    KL(p* || p_{k+1}) <= KL(p* || p_k) / (1 + eta). Nash Prox, version 2 of arXiv:2505.19731.

    Args, Returns, Raises: see `nash_mirror_prox`.
    """

    def step(log_policy: Tensor, log_reference: Tensor, wins: Tensor, a: float) -> Tensor:
        inner = (a * log_reference + (1.0 - a) * log_policy).log_softmax(0)
        return _equilibrium(wins, inner, beta / a)

    return _iterate(step, preference, reference, beta, eta, iterations)


def nash_equilibrium(preference: Tensor, reference: Tensor, beta: float) -> Tensor:
    """[n] the equilibrium, by mirror prox until it stands still.

    Raises:
        ConfigError: no such game, or beta <= 0.
    """
    _check(preference, reference, beta, 1.0, 0)
    return _equilibrium(preference.double(), _log(reference), beta).exp()


def exploitability(policy: Tensor, preference: Tensor, reference: Tensor, beta: float) -> float:
    """How much the best answer to a policy wins by, max_q J(q, policy) - 1/2 >= 0, 0 at the equilibrium only.

        beta log sum_y reference(y) exp(P(y beats policy) / beta) + beta KL(policy || reference) - 1/2

    Args:
        policy: [n] probabilities, all > 0.
    """
    _check(preference, reference, beta, 1.0, 0)
    log_reference, log_policy = _log(reference), _log(policy)
    best = beta * torch.logsumexp(log_reference + preference.double() @ log_policy.exp() / beta, 0)
    divergence = (log_policy.exp() * (log_policy - log_reference)).sum()
    return float(best + beta * divergence) - 0.5


def _prox(log_policy: Tensor, log_reference: Tensor, gain: Tensor, a: float) -> Tensor:
    return (a * (log_reference + gain) + (1.0 - a) * log_policy).log_softmax(0)


def _equilibrium(wins: Tensor, log_reference: Tensor, beta: float) -> Tensor:
    """log p*, with the step 2 beta, whose rate does not depend on the game."""
    a = 2.0 * beta / (1.0 + 2.0 * beta)
    log_policy = log_reference
    for _ in range(INNER_ITERATIONS):
        half = _prox(log_policy, log_reference, wins @ log_policy.exp() / beta, a)
        last, log_policy = log_policy, _prox(log_policy, log_reference, wins @ half.exp() / beta, a)
        if bool((log_policy - last).abs().max() < 1e-15):
            break
    return log_policy


def _iterate(
    step: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    preference: Tensor,
    reference: Tensor,
    beta: float,
    eta: float,
    iterations: int,
) -> Tensor:
    _check(preference, reference, beta, eta, iterations)
    log_reference, wins = _log(reference), preference.double()
    policies = [log_reference]
    for _ in range(iterations):
        policies.append(step(policies[-1], log_reference, wins, eta / (1.0 + eta)))
    return torch.stack(policies).exp()


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.double().log().log_softmax(0)


def _check(preference: Tensor, reference: Tensor, beta: float, eta: float, iterations: int) -> None:
    wins = preference.double()
    n = len(reference)
    if list(preference.shape) != [n, n] or not torch.allclose(wins + wins.T, torch.ones_like(wins), atol=1e-6):
        raise ConfigError(
            f"preference must be [{n}, {n}] like the reference, with P + P^T = 1, got {list(preference.shape)}; "
            "a response beats another one as often as that one loses"
        )
    total = float(reference.double().sum())
    if not bool((reference > 0).all()) or not math.isclose(total, 1.0, abs_tol=1e-6):
        raise ConfigError(f"reference must be probabilities > 0 that sum to 1, got the sum {total:g}; use softmax")
    if not beta > 0.0 or not eta > 0.0 or iterations < 0:
        raise ConfigError(
            f"beta and eta must be > 0 and iterations >= 0, got {beta}, {eta} and {iterations}; eta = 2 beta is usual"
        )
