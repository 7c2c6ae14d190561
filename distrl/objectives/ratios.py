"""Importance ratios as weights: which policy over which, over which tokens, tapered how."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from distrl.errors import ConfigError
from distrl.objectives.batch import Anchor, Batch
from distrl.objectives.tapers import Shape

Level = Literal["token", "prefix", "sequence", "mean"]
"""token: r_t; prefix: r_1 ... r_t; sequence: the full product; mean: its geometric mean over the response."""


class Weight(Protocol):
    """(batch, credit [B, T]) -> [B, T], >= 0, no gradient. The weights of a term are multiplied."""

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, batch: Batch, credit_BT: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Ratio:
    """A tapered importance ratio, phi(exp(log of - log over)).

    The log-differences are summed over the learnable tokens first and capped at `max_log_ratio` then:
    exp(200 T) is not finite, and a cap per token would let the sum grow with T all the same.
    """

    shape: Shape
    level: Level
    of: Anchor = field(default_factory=lambda: {"policy": 1.0})
    over: Anchor = field(default_factory=lambda: {"behavior": 1.0})
    max_log_ratio: float = 20.0
    """Largest argument of the exponential; e^20 is about 5e8. Ratios that reach it are counted."""

    def __post_init__(self) -> None:
        if not 0.0 < self.max_log_ratio <= 80.0:
            raise ConfigError(
                f"ratio.max_log_ratio must be in (0, 80], got {self.max_log_ratio}; "
                "use 20, exp(89) is not finite in float32"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({*self.of, *self.over})

    def live_log_ratio(self, batch: Batch) -> Tensor:
        """[B, T] log ratio at this level, uncapped, with the policy's gradient, 0 where the mask is False."""
        return self.at_level(batch, batch.log(self.of) - batch.log(self.over))

    def log_ratio(self, batch: Batch) -> Tensor:
        """The log ratio without gradient."""
        return self.live_log_ratio(batch).detach()

    def at_level(self, batch: Batch, token_BT: Tensor) -> Tensor:
        """[B, T] logs of token ratios summed or averaged over the learnable tokens as the level says."""
        if self.level == "token":
            return token_BT
        if self.level == "prefix":
            return torch.where(batch.mask, token_BT.cumsum(1), 0.0)
        total = token_BT.sum(1, keepdim=True)
        if self.level == "mean":
            total = total / batch.mask.sum(1, keepdim=True).clamp(min=1)
        return torch.where(batch.mask, total, 0.0)

    def __call__(self, batch: Batch, credit_BT: Tensor, /) -> Tensor:
        """The weight of each token.

        Returns:
            [B, T] phi(r), detached, finite for finite log-probabilities, 0 where the mask is False.
        """
        capped = self.log_ratio(batch).clamp(max=self.max_log_ratio)
        return torch.where(batch.mask, self.shape.weight(capped, credit_BT), 0.0)

    def potential(self, batch: Batch, credit_BT: Tensor) -> Tensor | None:
        """H of each token's ratio, for the number that is reported as the loss.

        Beyond the cap the weight is constant, so H goes on along its tangent.

        Returns:
            [B, T], detached. A ratio of the whole response has one H per response, shared equally by its
            tokens ("sequence": the sum over tokens is H) or repeated ("mean": the mean over tokens is H).
            None for "prefix", whose ratios depend on each other.
        """
        if self.level == "prefix":
            return None
        log_ratio = self.log_ratio(batch)
        capped = log_ratio.clamp(max=self.max_log_ratio)
        beyond = self.shape.weight(capped, credit_BT) * (log_ratio - capped)
        potential = torch.where(batch.mask, self.shape.potential(capped, credit_BT) + beyond, 0.0)
        if self.level == "sequence":
            potential = potential / batch.mask.sum(1, keepdim=True).clamp(min=1)
        return potential

    def counts(self, batch: Batch, credit_BT: Tensor) -> dict[str, Tensor]:
        """How often cap and bounds acted, over tokens, or over responses where a response has one ratio."""
        log_ratio = self.log_ratio(batch)
        at_bound = self.shape.at_bound(log_ratio.clamp(max=self.max_log_ratio), credit_BT)
        where = batch.mask
        if self.level in ("sequence", "mean"):
            first = batch.mask.int().argmax(1, keepdim=True)
            where = where & (torch.arange(where.shape[1], device=where.device) == first)
        return {
            "ratio_clamped": (where & (log_ratio > self.max_log_ratio)).sum(),
            "at_bound": (where & at_bound).sum(),
            "weights": where.sum(),
        }
