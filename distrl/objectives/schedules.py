"""Coefficients over time: (step, last metrics) -> coefficient."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from distrl.errors import ConfigError


class Schedule(Protocol):
    """The coefficient of a term at an optimizer step; the last step's metrics are there for controllers."""

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
        if self.steps < 1:
            raise ConfigError(f"linear.steps must be >= 1, got {self.steps}; use fixed for a constant coefficient")

    def __call__(self, step: int, metrics: Mapping[str, float], /) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)
