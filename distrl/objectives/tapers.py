"""Tapers: how an importance ratio becomes a weight, elementwise, with the objective that each one ascends.

A detached weight phi(r) in front of A grad log pi has the expected gradient of E_mu[A H(r)] where H' = phi /
r, that is dH / d log r = phi (Le Roux et al. 2025, arXiv:2503.14286, for a clipped phi). `weight` is phi,
`potential` is H. The tests differentiate every potential and compare it with its weight.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distrl.errors import ConfigError


class Shape(Protocol):
    """A taper; every method is elementwise over log ratios and credits of one shape."""

    def weight(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        """phi(r), >= 0."""
        ...

    def potential(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        """H(r) with dH / d log r = phi: -A H is the number reported as the loss."""
        ...

    def at_bound(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        """bool, True where a bound made the weight differ from the ratio."""
        ...


@dataclass(frozen=True, slots=True)
class Truncate:
    """Truncated importance sampling, phi(r) = min(max(r, low), high).

        H(r) = r on [low, high],  high + high log(r / high) above,  low + low log(r / low) below

    high = inf is exact importance sampling; low = high = 1 is no weight at all.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.high or self.high == 0.0 or self.low == math.inf:
            raise ConfigError(
                f"truncate.low must be >= 0 and <= truncate.high, which must be > 0, "
                f"got low {self.low} and high {self.high}; 0 and 1 never enlarge a ratio"
            )

    def weight(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        return self._inside(log_ratio).exp()

    def potential(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        inside = self._inside(log_ratio)
        return inside.exp() * (1.0 + log_ratio - inside)

    def at_bound(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        # An interval of one point is a constant weight, not a bound that ratios run into.
        return (self._inside(log_ratio) != log_ratio) & (self.low < self.high)

    def _inside(self, log_ratio: Tensor) -> Tensor:
        low = math.log(self.low) if self.low > 0.0 else -math.inf
        return log_ratio.clamp(low, math.log(self.high) if self.high < math.inf else math.inf)


@dataclass(frozen=True, slots=True)
class SignedTruncate:
    """The taper of TOPR: one interval for credits >= 0, another one for credits < 0.

        phi(r) = clip(r, a_plus, b_plus) where A >= 0,  clip(r, a_minus, b_minus) where A < 0

    Le Roux et al. 2025, arXiv:2503.14286. Canonical (1, 1, 0, 1): good responses are imitated whatever their
    ratio, bad ones are pushed down only as far as the policy still gives them. (1, 1, 1, 1) is naive
    off-policy REINFORCE, (0, inf, 0, inf) exact importance sampling, (0, 1, 0, 1) truncated importance
    sampling.
    """

    a_plus: float = 1.0
    b_plus: float = 1.0
    a_minus: float = 0.0
    b_minus: float = 1.0

    def __post_init__(self) -> None:
        for sign, a, b in (("plus", self.a_plus, self.b_plus), ("minus", self.a_minus, self.b_minus)):
            if not 0.0 <= a <= b or b == 0.0 or a == math.inf:
                raise ConfigError(
                    f"signed_truncate.a_{sign} must be >= 0 and <= b_{sign}, which must be > 0, "
                    f"got a_{sign} {a} and b_{sign} {b}; "
                    "canonical TOPR has a_plus 1, b_plus 1, a_minus 0, b_minus 1"
                )

    def weight(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        plus, minus = self._sides()
        return torch.where(credit >= 0, plus.weight(log_ratio, credit), minus.weight(log_ratio, credit))

    def potential(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        plus, minus = self._sides()
        return torch.where(credit >= 0, plus.potential(log_ratio, credit), minus.potential(log_ratio, credit))

    def at_bound(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        plus, minus = self._sides()
        return torch.where(credit >= 0, plus.at_bound(log_ratio, credit), minus.at_bound(log_ratio, credit))

    def _sides(self) -> tuple[Truncate, Truncate]:
        return Truncate(self.a_plus, self.b_plus), Truncate(self.a_minus, self.b_minus)


@dataclass(frozen=True, slots=True)
class Mask:
    """Masked importance sampling: the ratio itself inside a band, nothing outside.

        phi(r) = r where low <= r <= high,  0 elsewhere;  H(r) = min(max(r, low), high)

    IcePop, Ling team 2025 (arXiv:2510.18855). A masked token still counts in the divisor of the loss, so
    that masking does not enlarge the others.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= 1.0 <= self.high:
            raise ConfigError(
                f"mask.low must be in [0, 1] and mask.high >= 1, got low {self.low} and high {self.high}; "
                "else an unchanged policy would learn nothing: 0.5 and 5 are usual"
            )

    def weight(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        return torch.where(self.at_bound(log_ratio, credit), 0.0, log_ratio.exp())

    def potential(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        return log_ratio.exp().clamp(self.low, self.high)

    def at_bound(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        ratio = log_ratio.exp()
        return (ratio < self.low) | (ratio > self.high)


@dataclass(frozen=True, slots=True)
class PPOClip:
    """The clipped surrogate of PPO as a taper: the ratio, until it has moved far enough in the wanted
    direction.

        phi(r) = r where A >= 0 and r < 1 + high, or A < 0 and 1 - low < r < dual;  0 elsewhere
        H(r) = min(r, 1 + high) where A >= 0,  min(max(r, 1 - low), dual) where A < 0

    A H(r) = min(r A, clip(r, 1 - low, 1 + high) A), eq. 7 of Schulman et al. 2017 (arXiv:1707.06347);
    separate bounds as in DAPO (arXiv:2503.14476). A finite `dual` > 1 bounds the push on tokens that became
    much more likely although they were bad (Ye et al. 2019, arXiv:1912.09729).
    """

    low: float = 0.2
    high: float = 0.2
    dual: float = math.inf

    def __post_init__(self) -> None:
        if not 0.0 < self.low <= 1.0 or not self.high > 0.0:
            raise ConfigError(
                "ppo_clip.low must be in (0, 1] and ppo_clip.high > 0, "
                f"got low {self.low} and high {self.high}; "
                "both are distances from 1, and 0.2 is the usual value"
            )
        if not self.dual > 1.0:
            raise ConfigError(f"ppo_clip.dual must be > 1, got {self.dual}; 3 is usual, .inf turns it off")

    def weight(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        return torch.where(self.at_bound(log_ratio, credit), 0.0, log_ratio.exp())

    def potential(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        ratio = log_ratio.exp()
        bad = ratio.clamp(1.0 - self.low, self.dual)
        return torch.where(credit >= 0, ratio.clamp(max=1.0 + self.high), bad)

    def at_bound(self, log_ratio: Tensor, credit: Tensor, /) -> Tensor:
        ratio = log_ratio.exp()
        bad = (ratio <= 1.0 - self.low) | (ratio >= self.dual)
        return torch.where(credit >= 0, ratio >= 1.0 + self.high, bad)
