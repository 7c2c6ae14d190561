"""Sampled divergences as score terms: f'(u) grad log pi, u = pi / anchor.

With y ~ pi, E[f'(u) grad log pi] is the gradient of D_f(pi || anchor) = E_anchor[f(u)], so every sampled
divergence is a detached coefficient f'(u) in front of log pi, whose antiderivative in log u is the familiar
estimator:

    k2: f'(u) = log u,    estimator (log u)^2 / 2           reverse KL, D(pi || anchor)
    k3: f'(u) = 1 - 1/u,  estimator 1/u - 1 + log u         forward KL, D(anchor || pi)

(f' of the reverse KL is log u + 1; the constant has no expected gradient.) k1 = log u is not offered:
differentiated as a loss it has zero expected gradient. Estimators: Schulman 2020, "Approximating KL
Divergence".

Over several tokens these are the gradients of the divergence of the next token on the states that were
sampled. They are not the gradient of the divergence between whole responses, which also credits a token for
the divergence after it.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from distrl.objectives.batch import Anchor, Batch

Estimator = Literal["k2", "k3"]


def derivative(estimator: Estimator, log_u: Tensor, max_log_ratio: float) -> Tensor:
    """f'(u), elementwise; the exponential's argument is capped at max_log_ratio."""
    if estimator == "k2":
        return log_u
    return -torch.expm1((-log_u).clamp(max=max_log_ratio))


def estimate(estimator: Estimator, log_u: Tensor, max_log_ratio: float) -> Tensor:
    """The estimator, >= 0: the antiderivative of f' in log u that is 0 at u = 1."""
    if estimator == "k2":
        return log_u.square() / 2
    capped = (-log_u).clamp(max=max_log_ratio)
    # Beyond the cap f' is constant, so the estimator goes on along its tangent.
    return torch.expm1(capped) + log_u - (log_u + capped) * capped.exp()


@dataclass(frozen=True, slots=True)
class Divergence:
    """Sampled divergence of the policy from an anchor, per token.

        l_t = sg(w_t f'(u_t)) log pi(y_t | s_t),  u_t = pi(y_t | s_t) / anchor(y_t | s_t)

    With y ~ mu the weight w decides whose divergence it is. Same-token ratio pi / mu: the local divergence
    on the states of mu. Prefix product: on the states of pi. No weight: neither, unless mu = pi. With the
    same-token ratio truncated to [0, C] it is the first one wherever pi <= C mu, and in general the gradient
    of E_mu sum_t G_t with dG_t / d log pi = min(r_t, C) f'(u_t): a token that became more than C times as
    likely weighs as if it had become C times as likely. Shao et al. 2024 (arXiv:2402.03300), eq. 4: k3 and
    no weight.
    """

    estimator: Estimator
    anchor: Anchor = field(default_factory=lambda: {"reference": 1.0})
    max_log_ratio: float = 20.0

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
        slope = weight_BT * derivative(self.estimator, log_u, self.max_log_ratio)
        value = weight_BT * estimate(self.estimator, log_u, self.max_log_ratio)
        return slope * (logps - logps.detach()) + value
