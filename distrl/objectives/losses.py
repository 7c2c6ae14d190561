"""Losses: (batch, credit, weight) -> one differentiable value per unit."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distrl.objectives.batch import Batch


class Loss(Protocol):
    """One value per token. Weights and credits are constants; only batch.logps carries gradient."""

    @property
    def needs(self) -> frozenset[str]:
        """Models and columns that the loss itself reads."""
        ...

    def __call__(self, batch: Batch, credit_BT: Tensor, weight_BT: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Score:
    """The score-function loss, l_t = -sg(w_t A_t) log pi(y_t | s_t).

    Williams 1992, with a weight in front. Its value means nothing by itself; a term whose only weight is a
    ratio reports -A H instead (see `distrl.objectives.tapers`), which for PPO's clip is PPO's clipped
    surrogate.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"policy"})

    def __call__(self, batch: Batch, credit_BT: Tensor, weight_BT: Tensor, /) -> Tensor:
        """The loss of each token.

        Args:
            credit_BT: [B, T] A, constant, 0 where the mask is False.
            weight_BT: [B, T] w >= 0, constant.

        Returns:
            [B, T], exactly 0 with zero gradient where the mask is False.
        """
        return -(weight_BT * credit_BT).detach() * batch.log({"policy": 1.0})
