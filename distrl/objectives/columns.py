"""Columns: what a credit sums as rewards and what a term chooses its tokens by, [B] or [B, T], without gradient."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from distrl.errors import ConfigError
from distrl.objectives.batch import Anchor, Batch
from distrl.objectives.schedules import Fixed, Schedule


class Column(Protocol):
    """A reward component, a filter or a derived model: [B] or [B, T], constant."""

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, batch: Batch, /) -> Tensor: ...


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
class Penalty:
    """KL in the reward: each token pays -coefficient (log of - log over).

    With y ~ pi and the return to go, or the whole one, the expected gradient is that of the KL between whole
    responses, KL(pi || anchor) = E_pi[sum_t KL_t]; with the return of the same token only that of the
    next-token divergences on the sampled states. The credit's scale divides it like every reward, so that a
    standardized credit changes its coefficient; such a recipe has to say `scale_includes_kl`.
    """

    coefficient: Schedule
    over: Anchor = field(default_factory=lambda: {"reference": 1.0})
    of: Anchor = field(default_factory=lambda: {"policy": 1.0})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({*self.of, *self.over})

    def strength(self, batch: Batch) -> float:
        """The coefficient at the step of the batch."""
        return self.coefficient(batch.step, batch.metrics)

    def __call__(self, batch: Batch, /) -> Tensor:
        return -self.strength(batch) * (batch.log(self.of) - batch.log(self.over)).detach()


@dataclass(frozen=True, slots=True)
class Overlong:
    """The soft punishment of long responses: 0 up to L - cache tokens, linear to -1 at L, -1 beyond.

    Yu et al. 2025 (arXiv:2503.14476), eq. 13. The length is the number of learnable tokens.
    """

    max_length: float
    """L, in tokens."""
    cache: float
    """How many tokens before L the punishment sets in."""

    def __post_init__(self) -> None:
        if not 0.0 < self.cache <= self.max_length:
            raise ConfigError(
                f"overlong.cache must be > 0 and <= overlong.max_length, got cache {self.cache} "
                f"and max_length {self.max_length}; the paper has 4096 of 20480 tokens"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, batch: Batch, /) -> Tensor:
        over = batch.mask.sum(1).double() - (self.max_length - self.cache)
        return -(over / self.cache).clamp(0.0, 1.0)


@dataclass(frozen=True, slots=True)
class VariedGroup:
    """True for the responses of groups whose rewards differ: the others have no credit to learn from.

    The part of dynamic sampling that the loss sees (Yu et al. 2025, arXiv:2503.14476): what is left out does
    not count. Drawing other prompts in their place is the system's part.
    """

    name: str = "rewards"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.name, "group"})

    def __call__(self, batch: Batch, /) -> Tensor:
        rewards = batch.columns[self.name].detach()
        total = torch.where(batch.mask, rewards, 0.0).sum(1) if rewards.ndim == 2 else rewards
        return batch.pool(total.double(), "amax") > batch.pool(total.double(), "amin")


@dataclass(frozen=True, slots=True)
class Loglinear:
    """The proximal policy guessed from version numbers, without the forward pass that records it.

        log proximal = log behavior + a (log policy - log behavior),  a = (v - 1 - v_behavior) / (v - v_behavior)

    v is the step, v_behavior the version that sampled the token; a is 0 for tokens of version v and in
    [0, 1) for every older one. Fu et al. 2025 (arXiv:2505.24298), from the code of AReaL.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"policy", "behavior", "policy_versions"})

    def __call__(self, batch: Batch, /) -> Tensor:
        age = batch.step - batch.column("policy_versions")
        share = ((age - 1) / age.clamp(min=1)).clamp(0.0, 1.0)
        policy, behavior = batch.log({"policy": 1.0}).detach(), batch.log({"behavior": 1.0})
        return behavior + share * (policy - behavior)


def penalty(coefficient: float, **over: float) -> Penalty:
    """A penalty with a fixed coefficient, for recipes that are composed in Python."""
    return Penalty(Fixed(coefficient), over or {"reference": 1.0})
