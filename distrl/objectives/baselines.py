"""Baselines and scales: what is subtracted from returns, and what the rest is divided by."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from distrl.errors import ConfigError
from distrl.objectives.batch import Batch


class Baseline(Protocol):
    """Returns [B, T] -> what is subtracted from them, [B, 1] or [B, T]."""

    @property
    def needs(self) -> frozenset[str]:
        """Models and columns that it reads."""
        ...

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor: ...


class Scale(Protocol):
    """Centered returns [B, T] -> what they are divided by, > 0, [B, 1] or [B, T]."""

    @property
    def needs(self) -> frozenset[str]:
        """Models and columns that it reads."""
        ...

    def __call__(self, centered_BT: Tensor, batch: Batch, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Constant:
    """The same baseline c for every response.

    Without an exact importance weight a baseline is not neutral: it adds c grad KL(mu || pi), a push away
    from the behavior policy for c > 0 and a pull towards it for c < 0 (Le Roux et al. 2025,
    arXiv:2503.14286).
    """

    value: float = 0.0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor:
        return torch.full_like(returns_BT[:, :1], self.value)


@dataclass(frozen=True, slots=True)
class GroupMean:
    """The mean return of the response's group, itself included."""

    needs: ClassVar[frozenset[str]] = frozenset({"group"})
    smallest_group: ClassVar[int] = 2

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor:
        return batch.pool(returns_BT[:, 0], "mean")[:, None]


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """The mean return of the other responses of the group, which is independent of the response's own.

    Kool et al. 2019; Ahmadian et al. 2024 (arXiv:2402.14740). A response alone in its group is its own
    baseline, so that its credit is 0.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"group"})
    smallest_group: ClassVar[int] = 2

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor:
        returns = returns_BT[:, 0]
        # Relative to the lowest: equal returns give exactly that return, and so a credit of exactly 0.
        lowest = batch.pool(returns, "amin")
        size = batch.pool(torch.ones_like(returns), "sum")
        others = batch.pool(returns - lowest, "sum") - (returns - lowest)
        return torch.where(size > 1, lowest + others / (size - 1).clamp(min=1), returns)[:, None]


@dataclass(frozen=True, slots=True)
class BatchMean:
    """The mean over all learnable tokens of the global batch."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor:
        return batch_mean(returns_BT, batch.mask).expand_as(returns_BT[:, :1])


@dataclass(frozen=True, slots=True)
class EffectivePositives:
    """The constant c that gives positive credits a chosen share, sum (R - c)+ / sum |R - c| = share.

    Le Roux et al. 2025 (arXiv:2503.14286): choosing c rebalances the data; 0.1 to 0.2 worked best off-policy.
    For rewards in {-1, 1} with a fraction p of 1 it is c = (p - share) / (p + share - 2 p share). In general
    it is the expectile of the batch's returns at level 1 - share.
    """

    share: float
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ConfigError(f"positives.share must be in (0, 1), got {self.share}; the paper has 0.1 to 0.2")

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor:
        returns = returns_BT[:, 0]
        c = returns.mean()
        # The fixed point of a weighted mean whose weights have two values: reached after finitely many steps.
        for _ in range(100):
            weight = self.share + (returns > c).to(returns.dtype) * (1.0 - 2.0 * self.share)
            last, c = c, (weight * returns).sum() / weight.sum()
            if c == last:
                break
        c = torch.where(returns.amax() == returns.amin(), returns[0], c)
        return c.expand_as(returns_BT[:, :1])


@dataclass(frozen=True, slots=True)
class Value:
    """The value head's prediction before each token."""

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor:
        return batch.column("values", torch.float64).detach()


@dataclass(frozen=True, slots=True)
class FromColumn:
    """A baseline that somebody computed before, one per response: `v_star`, the optimal value of A*-PO."""

    name: str

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.name})

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor:
        return batch.columns[self.name].detach().double()[:, None]


@dataclass(frozen=True, slots=True)
class Then:
    """Two baselines: the second one is that of the returns minus the first."""

    first: Baseline
    second: Baseline

    @property
    def needs(self) -> frozenset[str]:
        return self.first.needs | self.second.needs

    @property
    def smallest_group(self) -> int:
        return max(smallest_group(self.first), smallest_group(self.second))

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor:
        first = self.first(returns_BT, batch)
        return first + self.second(returns_BT - first, batch)


@dataclass(frozen=True, slots=True)
class One:
    """No scale."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, centered_BT: Tensor, batch: Batch, /) -> Tensor:
        return torch.ones_like(centered_BT[:, :1])


@dataclass(frozen=True, slots=True)
class GroupStd:
    """Population standard deviation of the group's returns, plus epsilon; 1 where that is 0.

    torch.std is the sample deviation, sqrt(G / (G - 1)) times larger: with it, the closed forms for binary
    rewards (Shao et al. 2024, arXiv:2402.03300) do not hold.
    """

    epsilon: float = 1e-6
    needs: ClassVar[frozenset[str]] = frozenset({"group"})

    def __call__(self, centered_BT: Tensor, batch: Batch, /) -> Tensor:
        centered = centered_BT[:, 0] - batch.pool(centered_BT[:, 0], "mean")
        scale = batch.pool(centered.square(), "mean").sqrt() + self.epsilon
        return torch.where(scale > 0, scale, 1.0)[:, None]


@dataclass(frozen=True, slots=True)
class BatchStd:
    """Population standard deviation over all learnable tokens of the global batch, plus epsilon; 1 where
    that is 0."""

    epsilon: float = 1e-8
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, centered_BT: Tensor, batch: Batch, /) -> Tensor:
        centered = centered_BT - batch_mean(centered_BT, batch.mask)
        scale = batch_mean(centered.square(), batch.mask).sqrt() + self.epsilon
        return torch.where(scale > 0, scale, 1.0).expand_as(centered_BT[:, :1])


def smallest_group(baseline: Baseline) -> int:
    """How many responses a group must have for credits that are not 0 whatever the rewards."""
    return int(getattr(baseline, "smallest_group", 1))


def batch_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the learnable tokens, a scalar; exactly the common value where there is only one."""
    count = mask_BT.sum().clamp(min=1)
    lowest = torch.where(mask_BT, values_BT, torch.inf).amin()
    lowest = torch.where(lowest.isfinite(), lowest, 0.0)
    return lowest + torch.where(mask_BT, values_BT - lowest, 0.0).sum() / count
