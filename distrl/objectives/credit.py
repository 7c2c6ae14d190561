"""Credit of each token, (return - baseline) / scale: what a score loss multiplies log-probabilities with.

Made once per step on the whole global batch, in float64, without gradient.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from distrl.errors import SchemaError
from distrl.objectives.batch import Batch


class Column(Protocol):
    """A reward component, a filter or a row weight: [B] or [B, T], constant."""

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, batch: Batch, /) -> Tensor: ...


class Return(Protocol):
    """Token rewards [B, T] -> returns [B, T]; the first position holds the return of the whole response."""

    def __call__(self, rewards_BT: Tensor, batch: Batch, /) -> Tensor: ...


class Baseline(Protocol):
    """Returns [B, T] -> what is subtracted from them, [B, 1] or [B, T]."""

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor: ...


class Scale(Protocol):
    """Returns [B, T] -> what the centered returns are divided by, > 0, [B, 1] or [B, T]."""

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A column of the batch as it is, for example the rewards that the graders gave."""

    name: str = "rewards"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.name})

    def __call__(self, batch: Batch, /) -> Tensor:
        return batch.columns[self.name].detach()


@dataclass(frozen=True, slots=True)
class Whole:
    """Every token is credited with the reward of the whole response, sum_t r_t."""

    def __call__(self, rewards_BT: Tensor, batch: Batch, /) -> Tensor:
        return rewards_BT.sum(1, keepdim=True).expand_as(rewards_BT)


@dataclass(frozen=True, slots=True)
class Constant:
    """The same baseline c for every response.

    Without an exact importance weight a baseline is not neutral: it adds c grad KL(mu || pi), a push away
    from the behavior policy for c > 0 and a pull towards it for c < 0 (Le Roux et al. 2025,
    arXiv:2503.14286).
    """

    value: float

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor:
        return torch.full_like(returns_BT[:, :1], self.value)


@dataclass(frozen=True, slots=True)
class GroupMean:
    """The mean return of the response's group, itself included."""

    smallest_group: ClassVar[int] = 2

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor:
        return _group_mean(returns_BT[:, :1], batch)


@dataclass(frozen=True, slots=True)
class One:
    """No scale."""

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor:
        return torch.ones_like(returns_BT[:, :1])


@dataclass(frozen=True, slots=True)
class GroupStd:
    """Population standard deviation of the group's returns, plus epsilon; 1 where that is 0.

    torch.std is the sample deviation, sqrt(G / (G - 1)) times larger: with it, the closed forms for binary
    rewards (Shao et al. 2024, arXiv:2402.03300) do not hold.
    """

    epsilon: float = 1e-6

    def __call__(self, returns_BT: Tensor, batch: Batch, /) -> Tensor:
        returns = returns_BT[:, :1]
        centered = returns - _group_mean(returns, batch)
        scale = _group_mean(centered.square(), batch).sqrt() + self.epsilon
        return torch.where(scale > 0, scale, 1.0)


@dataclass(frozen=True, slots=True)
class Credit:
    """(return of the summed rewards - baseline) / scale."""

    rewards: tuple[Column, ...] = field(default_factory=lambda: (Stored(),))
    returns: Return = field(default_factory=Whole)
    baseline: Baseline = field(default_factory=lambda: Constant(0.0))
    scale: Scale = field(default_factory=One)

    @property
    def needs(self) -> frozenset[str]:
        """The columns that the credit reads, and "group" where responses of a ticket are compared."""
        columns = frozenset[str]().union(*(column.needs for column in self.rewards))
        grouped = isinstance(self.baseline, GroupMean) or isinstance(self.scale, GroupStd)
        return columns | (frozenset({"group"}) if grouped else frozenset())

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Credit of every token.

        Returns:
            [B, T] float64 credit, 0 where the mask is False, and [B] credit of the response as a whole.
        """
        rewards = torch.zeros(batch.mask.shape, dtype=torch.float64, device=batch.mask.device)
        for column in self.rewards:
            rewards = rewards + _on_tokens(column(batch).double(), batch.mask)
        returns = self.returns(rewards, batch)
        credit = (returns - self.baseline(returns, batch)) / self.scale(returns, batch)
        return torch.where(batch.mask, credit, 0.0), credit[:, 0]


def _on_tokens(rewards: Tensor, mask_BT: Tensor) -> Tensor:
    """A reward per token is masked; one per response is paid at its last position (so none is lost to an
    empty mask)."""
    if rewards.ndim == 2:
        return torch.where(mask_BT, rewards, 0.0)
    paid = torch.zeros(mask_BT.shape, dtype=rewards.dtype, device=rewards.device)
    positions = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last = torch.where(mask_BT, positions, 0).amax(1)
    return paid.scatter(1, last[:, None], rewards[:, None])


def _group_mean(values_B1: Tensor, batch: Batch) -> Tensor:
    """[B, 1] mean over the rows of each row's group; exactly the common value where a group has one value."""
    if batch.group is None:
        raise SchemaError("the batch has no tensor group ([B] int), which a group mean reads; pass the ticket numbers")
    _, number = torch.unique(batch.group, return_inverse=True)
    number = number[:, None]
    groups = int(number.max()) + 1

    def pool(values: Tensor, how: str) -> Tensor:
        start = torch.zeros(groups, 1, dtype=values.dtype, device=values.device)
        return start.scatter_reduce(0, number, values, how, include_self=False).gather(0, number)

    # The mean of equal numbers may differ from them in the last bit, which a deviation of 0 would turn into
    # +-1.
    lowest = pool(values_B1, "amin")
    return lowest + pool(values_B1 - lowest, "mean")
