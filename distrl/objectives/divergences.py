"""f-divergences, one class each: pointwise value and slope from two log-probabilities.

    D_f(q || p) = sum_v p_v f(q_v / p_v),  f convex, f(1) = 0

Every f is taken with f'(1) (u - 1) subtracted, which changes no divergence and makes p f(q / p) >= 0, the
slope 0 where q = p and the variance of the sampled gradient smaller. p f(q / p) is homogeneous, so that one
function of (log q, log p) serves a sampled token (q = 1, p = anchor / policy), a whole vocabulary, and k
symbols with a tail.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from distrl.errors import ConfigError


class Row(Protocol):
    """A divergence; both methods are elementwise, with exponents capped by the caller."""

    def pointwise(self, log_q: Tensor, log_p: Tensor, /) -> Tensor:
        """p f(q / p), >= 0, differentiable in log q; its derivative in log q is q f'(q / p)."""
        ...

    def slope(self, log_u: Tensor, /) -> Tensor:
        """f'(u), u = q / p."""
        ...

    def sampled(self, log_u: Tensor, /) -> Tensor:
        """The number reported for a token drawn from q, 0 at u = 1."""
        ...

    @property
    def exponential(self) -> bool:
        """Whether slope or reported number takes an exponential, so that log u needs a cap."""
        ...


class _Unbiased:
    """Reports f(u) / u, whose mean under q is the divergence."""

    __slots__ = ()
    exponential: ClassVar[bool] = True

    def sampled(self: Row, log_u: Tensor, /) -> Tensor:
        return self.pointwise(torch.zeros_like(log_u), -log_u)


@dataclass(frozen=True, slots=True)
class ReverseKL(_Unbiased):
    """KL(q || p): f = u log u - u + 1, f' = log u. `normalized` leaves out the mass u - 1: f' = log u + 1."""

    normalized: bool = False

    def pointwise(self, log_q: Tensor, log_p: Tensor, /) -> Tensor:
        value = log_q.exp() * (log_q - log_p)
        return value if self.normalized else value - log_q.exp() + log_p.exp()

    def slope(self, log_u: Tensor, /) -> Tensor:
        return log_u + 1.0 if self.normalized else log_u


@dataclass(frozen=True, slots=True)
class ForwardKL(_Unbiased):
    """KL(p || q): f = u - 1 - log u, f' = 1 - 1/u. `normalized` leaves out the mass u - 1: f' = -1/u."""

    normalized: bool = False

    def pointwise(self, log_q: Tensor, log_p: Tensor, /) -> Tensor:
        value = log_p.exp() * (log_p - log_q)
        return value if self.normalized else value + log_q.exp() - log_p.exp()

    def slope(self, log_u: Tensor, /) -> Tensor:
        return -(-log_u).exp() if self.normalized else -torch.expm1(-log_u)


@dataclass(frozen=True, slots=True)
class K2(ReverseKL):
    """The reverse KL, reported as (log u)^2 / 2, of which it is the slope (Schulman 2020)."""

    exponential: ClassVar[bool] = False

    def sampled(self, log_u: Tensor, /) -> Tensor:
        return log_u.square() / 2


@dataclass(frozen=True, slots=True)
class K3(ForwardKL):
    """The forward KL, reported as 1/u - 1 + log u, of which it is the slope (Schulman 2020).

    The reported number estimates KL(q || p), its gradient is that of KL(p || q).
    """

    def sampled(self, log_u: Tensor, /) -> Tensor:
        return torch.expm1(-log_u) + log_u


@dataclass(frozen=True, slots=True)
class JensenShannon(_Unbiased):
    """f = (u log u - (u + 1) log((u + 1) / 2)) / 2, f' = log(2u / (1 + u)) / 2; in [0, log 2]."""

    def pointwise(self, log_q: Tensor, log_p: Tensor, /) -> Tensor:
        log_m = torch.logaddexp(log_q, log_p) - math.log(2.0)
        return (log_q.exp() * (log_q - log_m) + log_p.exp() * (log_p - log_m)) / 2

    def slope(self, log_u: Tensor, /) -> Tensor:
        return (math.log(2.0) + torch.nn.functional.logsigmoid(log_u)) / 2


@dataclass(frozen=True, slots=True)
class Hellinger(_Unbiased):
    """Squared Hellinger distance: f = (sqrt u - 1)^2 / 2, f' = (1 - u^(-1/2)) / 2; in [0, 1]."""

    def pointwise(self, log_q: Tensor, log_p: Tensor, /) -> Tensor:
        return ((log_q / 2).exp() - (log_p / 2).exp()).square() / 2

    def slope(self, log_u: Tensor, /) -> Tensor:
        return -torch.expm1(-log_u / 2) / 2


@dataclass(frozen=True, slots=True)
class ChiSquared(_Unbiased):
    """f = (u - 1)^2, f' = 2 (u - 1)."""

    def pointwise(self, log_q: Tensor, log_p: Tensor, /) -> Tensor:
        return log_p.exp() * torch.expm1(log_q - log_p).square()

    def slope(self, log_u: Tensor, /) -> Tensor:
        return 2.0 * torch.expm1(log_u)


@dataclass(frozen=True, slots=True)
class TotalVariation(_Unbiased):
    """f = |u - 1| / 2, f' = sign(u - 1) / 2; in [0, 1]."""

    def pointwise(self, log_q: Tensor, log_p: Tensor, /) -> Tensor:
        return (log_q.exp() - log_p.exp()).abs() / 2

    def slope(self, log_u: Tensor, /) -> Tensor:
        return log_u.sign() / 2


@dataclass(frozen=True, slots=True)
class Alpha(_Unbiased):
    """f = (u^(1-a) - (1-a) u - a) / (a (a-1)), f' = (1 - u^(-a)) / a, 0 < a < 1.

    a to 0 is KL(q || p), a to 1 KL(p || q), a = 1/2 four times the squared Hellinger distance.
    """

    a: float

    def __post_init__(self) -> None:
        if not 0.0 < self.a < 1.0:
            raise ConfigError(f"alpha.a must be in (0, 1), got {self.a}; its limits are k2 (0) and k3 (1)")

    def pointwise(self, log_q: Tensor, log_p: Tensor, /) -> Tensor:
        mixed = ((1.0 - self.a) * log_q + self.a * log_p).exp()
        return ((1.0 - self.a) * log_q.exp() + self.a * log_p.exp() - mixed) / (self.a * (1.0 - self.a))

    def slope(self, log_u: Tensor, /) -> Tensor:
        return -torch.expm1(-self.a * log_u) / self.a


@dataclass(frozen=True, slots=True)
class Tsallis(_Unbiased):
    """f = u (u^(q-1) - 1) / (q-1) - (u - 1), f' = q (u^(q-1) - 1) / (q-1), q > 0; q to 1 is KL(q || p), q = 2
    chi squared."""

    q: float

    def __post_init__(self) -> None:
        if not self.q > 0.0 or self.q == 1.0:
            raise ConfigError(f"tsallis.q must be > 0 and not 1, got {self.q}; its limit at 1 is k2")

    def pointwise(self, log_q: Tensor, log_p: Tensor, /) -> Tensor:
        ratio = log_q.exp() * torch.expm1((self.q - 1.0) * (log_q - log_p)) / (self.q - 1.0)
        return ratio - log_q.exp() + log_p.exp()

    def slope(self, log_u: Tensor, /) -> Tensor:
        return self.q * torch.expm1((self.q - 1.0) * log_u) / (self.q - 1.0)


def fold(logps: Tensor, index: Tensor) -> Tensor:
    """Log-probabilities of k symbols and of everything else together, a vocabulary of k + 1.

    Merging symbols never enlarges an f-divergence, so that what is computed on it is a lower bound.

    Args:
        logps: [..., V], normalized.
        index: [..., k] the symbols to keep, k < V.

    Returns:
        [..., k + 1], the tail last.
    """
    kept = logps.gather(-1, index)
    rest = logps.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], -1)
