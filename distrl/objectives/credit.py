"""Credit of each token, (return - baseline) / scale: what a score loss multiplies log-probabilities with.

Made once per step on the whole global batch, in float64, without gradient.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distrl.objectives.baselines import Baseline, Constant, One, Scale
from distrl.objectives.batch import Batch
from distrl.objectives.columns import Column, Penalty, Stored
from distrl.objectives.returns import Return, Whole


class Credited(NamedTuple):
    """What a credit makes of a batch, float64."""

    tokens: Tensor
    """[B, T] credit, 0 where the mask is False."""
    responses: Tensor
    """[B] credit of the response as a whole: of its first position, or the mean over its learnable tokens
    where the return has none of the whole response."""
    scale: Tensor
    """[B, 1] or [B, T] what the credit was divided by."""
    targets: Tensor
    """[B, T] what a value head should predict, 0 where the mask is False."""


@dataclass(frozen=True, slots=True)
class Credit:
    """(return of the summed rewards - baseline) / scale."""

    rewards: tuple[Column, ...] = field(default_factory=lambda: (Stored(),))
    returns: Return = field(default_factory=Whole)
    baseline: Baseline = field(default_factory=Constant)
    scale: Scale = field(default_factory=One)
    scale_includes_kl: bool = False
    """Says that a KL in the reward is meant to be divided by the scale, which changes its strength."""

    @property
    def needs(self) -> frozenset[str]:
        """The models and columns that the credit reads, "group" where responses of a ticket are compared."""
        columns = frozenset[str]().union(*(column.needs for column in self.rewards))
        return columns | self.returns.needs | self.baseline.needs | self.scale.needs

    @property
    def penalties(self) -> tuple[Penalty, ...]:
        """The KL terms among the rewards."""
        return tuple(column for column in self.rewards if isinstance(column, Penalty))

    def __call__(self, batch: Batch) -> Credited:
        """The credit of every token of the global batch."""
        rewards = torch.zeros(batch.mask.shape, dtype=torch.float64, device=batch.mask.device)
        for column in self.rewards:
            rewards = rewards + _on_tokens(column(batch).double(), batch.mask)
        returns = self.returns(rewards, batch)
        centered = returns - self.baseline(returns, batch)
        scale = self.scale(centered, batch)
        credit = centered / scale
        tokens = torch.where(batch.mask, credit, 0.0)
        mean = tokens.sum(1) / batch.mask.sum(1).clamp(min=1)
        responses = credit[:, 0] if self.returns.of_response else mean
        targets = torch.where(batch.mask, self.returns.targets(rewards, batch), 0.0)
        return Credited(tokens, responses, scale, targets)


def _on_tokens(rewards: Tensor, mask_BT: Tensor) -> Tensor:
    """A reward per token is masked; one per response is paid at its last position (so none is lost to an
    empty mask)."""
    if rewards.ndim == 2:
        return torch.where(mask_BT, rewards, 0.0)
    paid = torch.zeros(mask_BT.shape, dtype=rewards.dtype, device=rewards.device)
    positions = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last = torch.where(mask_BT, positions, 0).amax(1)
    return paid.scatter(1, last[:, None], rewards[:, None])
