"""Returns: what each token is credited with, before a baseline. Positions that were not learnable are no steps."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from distrl.errors import ConfigError
from distrl.objectives.batch import Batch


class Return(Protocol):
    """Token rewards [B, T] -> returns [B, T], without gradient."""

    @property
    def needs(self) -> frozenset[str]:
        """Models and columns that it reads."""
        ...

    @property
    def of_response(self) -> bool:
        """True where the first position holds the return of the whole response, learnable or not."""
        ...

    def __call__(self, rewards_BT: Tensor, batch: Batch, /) -> Tensor: ...

    def targets(self, rewards_BT: Tensor, batch: Batch, /) -> Tensor:
        """[B, T] what a value head should predict."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """Every token is credited with the reward of the whole response, sum_t r_t."""

    needs: ClassVar[frozenset[str]] = frozenset()
    of_response: ClassVar[bool] = True

    def __call__(self, rewards_BT: Tensor, batch: Batch, /) -> Tensor:
        return rewards_BT.sum(1, keepdim=True).expand_as(rewards_BT)

    def targets(self, rewards_BT: Tensor, batch: Batch, /) -> Tensor:
        return self(rewards_BT, batch)


@dataclass(frozen=True, slots=True)
class ToGo:
    """A token is credited with the rewards from it on, sum_{s >= t} gamma^(s - t) r_s."""

    gamma: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset()
    of_response: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_unit("to_go.gamma", self.gamma)

    def __call__(self, rewards_BT: Tensor, batch: Batch, /) -> Tensor:
        if self.gamma == 1.0:
            return rewards_BT.flip(1).cumsum(1).flip(1)
        return _backward(rewards_BT, torch.full_like(rewards_BT, self.gamma), batch.mask)

    def targets(self, rewards_BT: Tensor, batch: Batch, /) -> Tensor:
        return self(rewards_BT, batch)


@dataclass(frozen=True, slots=True)
class Now:
    """A token is credited with its own reward only, as a term of the loss would."""

    needs: ClassVar[frozenset[str]] = frozenset()
    of_response: ClassVar[bool] = False

    def __call__(self, rewards_BT: Tensor, batch: Batch, /) -> Tensor:
        return rewards_BT

    def targets(self, rewards_BT: Tensor, batch: Batch, /) -> Tensor:
        return rewards_BT


@dataclass(frozen=True, slots=True)
class GAE:
    """The lambda return V_t + sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t.

    Schulman et al. 2016 (arXiv:1506.02438); minus the value baseline it is the generalized advantage. With
    gamma = lam = 1 it is the return to go. The value after the last token is 0.
    """

    gamma: float = 1.0
    lam: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"values"})
    of_response: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_unit("gae.gamma", self.gamma)
        _check_unit("gae.lam", self.lam)

    def __call__(self, rewards_BT: Tensor, batch: Batch, /) -> Tensor:
        values = _values(batch)
        delta = rewards_BT + self.gamma * _next(values, batch.mask) - values
        return values + _backward(delta, torch.full_like(delta, self.gamma * self.lam), batch.mask)

    def targets(self, rewards_BT: Tensor, batch: Batch, /) -> Tensor:
        return self(rewards_BT, batch)


@dataclass(frozen=True, slots=True)
class VTrace:
    """Espeholt et al. 2018 (arXiv:1802.01561): values of a policy between behavior and policy, off-policy.

        v_t = V_t + sum_{s >= t} gamma^(s - t) (prod_{t <= i < s} c_i) rho_s (r_s + gamma V_{s+1} - V_s)

    rho = min(rho_bar, r), c = lam min(c_bar, r), r = pi / mu of the same token. The return is
    r_t + gamma v_{t+1}, the target of the value head v_t; rho_bar decides whose value that is, c_bar only how
    fast it gets there.
    """

    gamma: float = 1.0
    lam: float = 1.0
    rho_bar: float = 1.0
    c_bar: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"values", "policy", "behavior"})
    of_response: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_unit("vtrace.gamma", self.gamma)
        _check_unit("vtrace.lam", self.lam)
        for name, bound in (("rho_bar", self.rho_bar), ("c_bar", self.c_bar)):
            if not bound > 0.0:
                raise ConfigError(f"vtrace.{name} must be > 0, got {bound}; the paper has 1")

    def __call__(self, rewards_BT: Tensor, batch: Batch, /) -> Tensor:
        return rewards_BT + self.gamma * _next(self.targets(rewards_BT, batch), batch.mask)

    def targets(self, rewards_BT: Tensor, batch: Batch, /) -> Tensor:
        values = _values(batch)
        # exp(60) is larger than any useful bound and finite; an unbounded rho_bar keeps it finite.
        log_ratio = (batch.log({"policy": 1.0}) - batch.log({"behavior": 1.0})).detach().double()
        ratio = log_ratio.clamp(max=60.0).exp()
        delta = ratio.clamp(max=self.rho_bar) * (rewards_BT + self.gamma * _next(values, batch.mask) - values)
        trace = self.gamma * self.lam * ratio.clamp(max=self.c_bar)
        return values + _backward(delta, trace, batch.mask)


def _values(batch: Batch) -> Tensor:
    return batch.column("values", torch.float64).detach()


def _next(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """What stands at the next learnable position, 0 after the last one."""
    result = torch.zeros_like(values_BT)
    carry = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        result[:, t] = carry
        carry = torch.where(mask_BT[:, t], values_BT[:, t], carry)
    return result


def _backward(values_BT: Tensor, factor_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """x_t = value_t + factor_t x_{t+1} over learnable positions; others repeat what comes after them."""
    result = torch.zeros_like(values_BT)
    carry = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        carry = torch.where(mask_BT[:, t], values_BT[:, t] + factor_BT[:, t] * carry, carry)
        result[:, t] = carry
    return result


def _check_unit(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} must be in [0, 1], got {value}; 1 does not discount")
