"""Losses of pairs of responses to one prompt: (batch, credit, weight) -> [N], differentiable."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from distrl.errors import ConfigError
from distrl.objectives.batch import Anchor, Batch
from distrl.objectives.losses import Unit


@dataclass(frozen=True, slots=True)
class IPO:
    """Identity preference optimization with soft labels.

        L = p (h - 1 / (2 tau))^2 + (1 - p) (h + 1 / (2 tau))^2,  h = l(y) - l(y'),  l = log pi - log anchor

    p = P(y beats y'). Azar et al. 2023 (arXiv:2310.12036); with y, y' ~ pi it is Online IPO, Calandriello et
    al. 2024 (arXiv:2403.08635), whose expected gradient is -(4 / tau) times that of
    P(pi beats sg(pi)) - tau KL(pi || anchor).
    """

    tau: float
    anchor: Anchor = field(default_factory=lambda: {"reference": 1.0})
    unit: ClassVar[Unit] = "pair"

    def __post_init__(self) -> None:
        if not self.tau > 0.0:
            raise ConfigError(f"ipo.tau must be > 0, got {self.tau}; it is the strength of the KL to the anchor")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"policy", "pairs", "pair_preference", *self.anchor})

    def __call__(self, batch: Batch, credit_BT: Tensor, weight_BT: Tensor, /) -> Tensor:
        """The loss of each pair.

        Args:
            credit_BT, weight_BT: not read; pairs are drawn from the policy.

        Returns:
            [N]
        """
        first, second = batch.columns["pairs"].unbind(1)
        away = (batch.log({"policy": 1.0}) - batch.log(self.anchor)).sum(1)
        h = away[first] - away[second]
        wins = batch.columns["pair_preference"].to(h.dtype)
        margin = 1.0 / (2.0 * self.tau)
        return wins * (h - margin).square() + (1.0 - wins) * (h + margin).square()
