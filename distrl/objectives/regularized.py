"""Regularized policy gradient: reward minus a divergence under one importance weight, clipped together."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distrl.errors import ConfigError
from distrl.objectives.batch import Anchor, Batch
from distrl.objectives.divergences import Row
from distrl.objectives.losses import Unit
from distrl.objectives.ratios import Ratio


@dataclass(frozen=True, slots=True)
class Regularized:
    """The losses of RPG, Zhang et al. 2025 (arXiv:2505.17508), table 1 and algorithm 2.

        gradient = -(w A - beta w f'(u)) grad log pi inside the clip, 0 outside;  w = pi / mu, u = pi / anchor

    With y ~ mu and the ratio of the whole response, unclipped, that is the gradient of
    -(E_pi[A] - beta D_f(pi || anchor)). The clip looks at the sign of the regularized credit A - beta f'(u).

    With anchor = behavior (u = w) these are the paper's four rows: f' = log w + 1 (RKL), log w (URKL), -1/w
    (FKL), 1 - 1/w (UFKL).

    reinforce: the weight is a constant in front of log pi. differentiable: -w A + beta w f(u) / u, whose
    gradient flows through w. The gradients are the same; the second form's value is the objective itself.
    """

    divergence: Row
    coefficient: float
    ratio: Ratio
    anchor: Anchor = field(default_factory=lambda: {"behavior": 1.0})
    form: Literal["differentiable", "reinforce"] = "reinforce"
    unit: ClassVar[Unit] = "token"

    def __post_init__(self) -> None:
        if self.ratio.level not in ("token", "sequence"):
            raise ConfigError(
                f"regularized.ratio.level must be token or sequence, got {self.ratio.level}; "
                "the ratio of the differentiable form has to be that of what is weighted"
            )

    @property
    def needs(self) -> frozenset[str]:
        return self.ratio.needs | frozenset(self.anchor)

    def __call__(self, batch: Batch, credit_BT: Tensor, weight_BT: Tensor, /) -> Tensor:
        """The loss of each token.

        Args:
            credit_BT: [B, T] A, without the divergence.
            weight_BT: [B, T] constant, multiplied in.

        Returns:
            [B, T]; for a ratio of whole responses the sum over a response is its loss.
        """
        beta = self.coefficient
        log_w, _, log_anchor = self._logs(batch)
        inside = batch.mask & ~self.ratio.shape.at_bound(log_w.detach(), self.regularized_credit(batch, credit_BT))
        length = batch.mask.sum(1, keepdim=True).clamp(min=1) if self.ratio.level == "sequence" else 1.0
        if self.form == "differentiable":
            # The sum of all tokens moves the ratio of the response: each token carries its share of the loss.
            reward = log_w.exp() * credit_BT
            loss = (beta * self.divergence.pointwise(log_w, log_anchor) - reward) / length
            return weight_BT * torch.where(inside, loss, loss.detach())
        live = log_w.detach().requires_grad_()
        with torch.enable_grad():
            (tilt,) = torch.autograd.grad(self.divergence.pointwise(live, log_anchor).sum(), live)
        push = torch.where(inside, live.detach().exp() * credit_BT - beta * tilt, 0.0)
        return -(weight_BT * push).detach() * batch.log({"policy": 1.0})

    def regularized_credit(self, batch: Batch, credit_BT: Tensor) -> Tensor:
        """[B, T] A - beta f'(u), whose sign chooses the side of the clip."""
        return (credit_BT - self.coefficient * self.divergence.slope(self._logs(batch)[1])).detach()

    def _logs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """log w with gradient, log u and log (anchor / mu), capped from both sides, at the ratio's level.

        The cap passes the gradient through: beyond it the weight is constant, as that of a `Ratio`.
        """
        cap = self.ratio.max_log_ratio
        raw = self.ratio.live_log_ratio(batch)
        log_w = raw.detach().clamp(-cap, cap) + (raw - raw.detach())
        log_anchor = self.ratio.at_level(batch, batch.log(self.anchor) - batch.log(self.ratio.over)).clamp(-cap, cap)
        return log_w, (log_w - log_anchor).detach().clamp(-cap, cap), log_anchor
