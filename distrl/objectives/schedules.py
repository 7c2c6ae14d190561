"""Coefficients over time: (step, last metrics) -> coefficient."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from distrl.errors import ConfigError


class Schedule(Protocol):
    """A coefficient at an optimizer step; the last step's metrics are there for controllers."""

    def __call__(self, step: int, metrics: Mapping[str, float], /) -> float: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same coefficient at every step."""

    value: float

    def __call__(self, step: int, metrics: Mapping[str, float], /) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class Linear:
    """From `start` at step 0 to `end` at step `steps`, constant after it."""

    start: float
    end: float
    steps: float

    def __post_init__(self) -> None:
        _check_steps("linear", self.steps)

    def __call__(self, step: int, metrics: Mapping[str, float], /) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True, slots=True)
class Cosine:
    """From `start` at step 0 to `end` at step `steps` along half a cosine, constant after it."""

    start: float
    end: float
    steps: float

    def __post_init__(self) -> None:
        _check_steps("cosine", self.steps)

    def __call__(self, step: int, metrics: Mapping[str, float], /) -> float:
        done = (1.0 - math.cos(math.pi * min(step / self.steps, 1.0))) / 2.0
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Raised while an observed divergence is above its target, lowered while it is below.

        c <- c (1 + clip(observed / target - 1, -0.2, 0.2) / horizon)

    Ziegler et al. 2019 (arXiv:1909.08593), the horizon in optimizer steps. The state is in the metrics: the
    coefficient of the step before under `last`, so that a resumed run goes on where it was.
    """

    start: float
    target: float
    horizon: float
    observed: str = "kl_reference"
    last: str = "coefficient_kl"

    def __post_init__(self) -> None:
        if not self.target > 0.0 or not self.horizon > 0.0:
            raise ConfigError(
                f"adaptive.target and adaptive.horizon must be > 0, got {self.target} and {self.horizon}; "
                "use fixed for a coefficient that does not move"
            )

    def __call__(self, step: int, metrics: Mapping[str, float], /) -> float:
        if self.observed not in metrics or self.last not in metrics:
            return self.start
        error = min(max(metrics[self.observed] / self.target - 1.0, -0.2), 0.2)
        return metrics[self.last] * (1.0 + error / self.horizon)


def _check_steps(name: str, steps: float) -> None:
    if steps < 1:
        raise ConfigError(f"{name}.steps must be >= 1, got {steps}; use fixed for a constant coefficient")
