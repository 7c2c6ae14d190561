"""Losses of tokens: (batch, credit, weight) -> [B, T], differentiable. Losses of pairs are in `pairs`."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from distrl.errors import ConfigError
from distrl.objectives.batch import Anchor, Batch
from distrl.objectives.divergences import Row, fold

Unit = Literal["token", "pair"]


class Loss(Protocol):
    """One value per unit. Weights and credits are constants; logps, values and logits carry gradient."""

    @property
    def unit(self) -> Unit:
        """token: [B, T]; pair: [N]."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """Models and columns that the loss itself reads."""
        ...

    def __call__(self, batch: Batch, credit_BT: Tensor, weight_BT: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Score:
    """The score-function loss, l_t = -sg(w_t A_t) log pi(y_t | s_t).

    Williams 1992, with a weight in front. Its value means nothing by itself; a term with a ratio of the
    policy reports -A H instead (see `distrl.objectives.tapers`), which for PPO's clip is PPO's clipped
    surrogate.
    """

    unit: ClassVar[Unit] = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"policy"})

    def __call__(self, batch: Batch, credit_BT: Tensor, weight_BT: Tensor, /) -> Tensor:
        """The loss of each token.

        Args:
            credit_BT: [B, T] A, constant, 0 where the mask is False.
            weight_BT: [B, T] w >= 0, constant.

        Returns:
            [B, T], exactly 0 with zero gradient where the mask is False.
        """
        return -(weight_BT * credit_BT).detach() * batch.log({"policy": 1.0})


@dataclass(frozen=True, slots=True)
class Divergence:
    """Sampled divergence of the policy from an anchor, per token.

        l_t = sg(w_t f'(u_t)) log pi(y_t | s_t),  u_t = pi(y_t | s_t) / anchor(y_t | s_t)

    With y ~ pi, E[f'(u) grad log pi] is the gradient of D_f(pi || anchor). k2 is the reverse KL
    KL(pi || anchor), k3 the forward KL. k1 = log u is not offered: differentiated as a loss it has zero
    expected gradient.

    Over several tokens these are the gradients of the divergence of the next token on the states that were
    sampled. They are not the gradient of the divergence between whole responses, which also credits a token
    for the divergence after it (`Penalty` does).

    With y ~ mu the weight w decides whose divergence it is. Same-token ratio pi / mu: the local divergence
    on the states of mu. Prefix product: on the states of pi. No weight: neither, unless mu = pi. With the
    same-token ratio truncated to [0, C] it is the first one wherever pi <= C mu, and in general the gradient
    of E_mu sum_t G_t with dG_t / d log pi = min(r_t, C) f'(u_t): a token that became more than C times as
    likely weighs as if it had become C times as likely. Shao et al. 2024 (arXiv:2402.03300), eq. 4: k3 and
    no weight.
    """

    estimator: Row
    anchor: Anchor = field(default_factory=lambda: {"reference": 1.0})
    max_log_ratio: float = 20.0
    unit: ClassVar[Unit] = "token"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"policy", *self.anchor})

    def __call__(self, batch: Batch, credit_BT: Tensor, weight_BT: Tensor, /) -> Tensor:
        """The loss of each token.

        Args:
            credit_BT: not read.
            weight_BT: [B, T] constant.

        Returns:
            [B, T] whose value is the weighted estimator and whose gradient is sg(w f'(u)) grad log pi; both
            are exactly 0 where the mask is False.
        """
        logps = batch.log({"policy": 1.0})
        log_u = (logps - batch.log(self.anchor)).detach()
        bound = self.max_log_ratio if self.estimator.exponential else torch.inf
        capped = log_u.clamp(-bound, bound)
        slope = self.estimator.slope(capped)
        # Beyond the cap the slope is constant, so the reported number goes on along its tangent.
        value = self.estimator.sampled(capped) + slope * (log_u - capped)
        return torch.where(batch.mask, weight_BT * (slope * (logps - logps.detach()) + value), 0.0)


@dataclass(frozen=True, slots=True)
class FullDivergence:
    """Divergence of the next-token distribution from the reference's, from logits.

        l_t = w_t D_f(pi(. | s_t) || ref(. | s_t))

    The local divergence of `Divergence` without its variance: nothing depends on the token that was drawn.
    With top_k > 0 only the policy's k likeliest symbols and their complement are compared, a lower bound.
    """

    estimator: Row
    top_k: float = 0.0
    """0 compares the whole vocabulary."""
    max_log_ratio: float = 20.0
    unit: ClassVar[Unit] = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"policy", "logits", "ref_logits"})

    def __post_init__(self) -> None:
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ConfigError(
                f"full_divergence.top_k must be a whole number >= 0 of symbols, got {self.top_k}; 0 compares all"
            )

    def __call__(self, batch: Batch, credit_BT: Tensor, weight_BT: Tensor, /) -> Tensor:
        """The loss of each token, [B, T]; the gradient flows through `logits`."""
        # A forbidden symbol has the logit -inf; at -1e4 its probability is 0 all the same.
        log_q = batch.column("logits").log_softmax(-1).clamp(min=-1e4)
        log_p = batch.column("ref_logits").detach().log_softmax(-1).clamp(min=-1e4)
        if 0 < self.top_k < log_q.shape[-1]:
            index = log_q.detach().topk(int(self.top_k)).indices
            log_q, log_p = fold(log_q, index), fold(log_p, index)
        # A floor under the anchor bounds q / p; where it acts the divergence is cut off, as a sampled one is.
        log_p = torch.maximum(log_p, log_q.detach() - self.max_log_ratio)
        log_q = torch.maximum(log_q, log_p - 2 * self.max_log_ratio)
        divergence = self.estimator.pointwise(log_q, log_p).sum(-1)
        return torch.where(batch.mask, weight_BT * divergence, 0.0)


@dataclass(frozen=True, slots=True)
class Regression:
    """Squared residual of a whole response, shared equally by its tokens.

        L = w (beta (log pi(y) - log anchor(y)) - A)^2

    Sums over tokens, never means and never capped. With A = r - V*: A*-PO, Brantley et al. 2025
    (arXiv:2505.20686), whose gradient under y ~ pi is -2 beta grad(E r - beta KL(pi || anchor)) for any V*.
    """

    beta: float
    anchor: Anchor = field(default_factory=lambda: {"reference": 1.0})
    unit: ClassVar[Unit] = "token"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"policy", *self.anchor})

    def __call__(self, batch: Batch, credit_BT: Tensor, weight_BT: Tensor, /) -> Tensor:
        """The loss of each token.

        Args:
            credit_BT: [B, T] A, the same at every token of a response.
            weight_BT: [B, T] constant, the same at every token of a response.

        Returns:
            [B, T] whose sum over a response is its loss.
        """
        length = batch.mask.sum(1, keepdim=True).clamp(min=1)
        away = (batch.log({"policy": 1.0}) - batch.log(self.anchor)).sum(1, keepdim=True)
        residual = self.beta * away - credit_BT.sum(1, keepdim=True) / length
        return torch.where(batch.mask, weight_BT * residual.square() / length, 0.0)


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """Regression of the value head onto the targets of the credit's return.

        l_t = max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2) / 2

    V_old is what the head said when the step was prepared. Schulman et al.'s code for PPO
    (arXiv:1707.06347); an infinite clip is the plain square.
    """

    clip: float
    unit: ClassVar[Unit] = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    def __call__(self, batch: Batch, credit_BT: Tensor, weight_BT: Tensor, /) -> Tensor:
        """The loss of each token, [B, T]; the gradient flows through `values`."""
        values, old = batch.column("values"), batch.column("values_old").detach()
        target = batch.column("value_targets").detach()
        near = old + (values - old).clamp(-self.clip, self.clip)
        loss = torch.maximum((values - target).square(), (near - target).square()) / 2
        return torch.where(batch.mask, weight_BT * loss, 0.0)
