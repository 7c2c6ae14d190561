"""How the models behind an anchor are kept: what a recipe asks of the system, as data."""

from dataclasses import dataclass
from typing import Protocol

from distrl.errors import ConfigError


class Upkeep(Protocol):
    """One model's upkeep."""

    def describe(self) -> str:
        """What the system does, in a few words."""
        ...


@dataclass(frozen=True, slots=True)
class Frozen:
    """The weights that the run started from."""

    def describe(self) -> str:
        return "frozen at the start of the run"


@dataclass(frozen=True, slots=True)
class EMA:
    """anchor <- rate policy + (1 - rate) anchor after every optimizer step.

    1 makes the anchor the policy itself, so that a divergence from it vanishes; 0 freezes it.
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate <= 1.0:
            raise ConfigError(f"ema.rate must be in [0, 1], got {self.rate}; it is the share of the new policy")

    def describe(self) -> str:
        return f"moving average of the policy's weights, {self.rate:g} of the new ones after every step"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """anchor <- policy every `every` x `times` optimizer steps.

    Mirror prox: the opponent is renewed every half step, the anchor of both half steps every second time.
    """

    every: float
    times: float = 1.0

    def __post_init__(self) -> None:
        _check_every("snapshot", self.every)
        _check_every("snapshot", self.times, "times")

    def describe(self) -> str:
        return f"copy of the policy, renewed every {self.every * self.times:g} steps"


@dataclass(frozen=True, slots=True)
class Reset:
    """anchor <- policy every `every` optimizer steps, and the optimizer's state starts anew.

    Without the second half the divergence and its gradient are 0 after a reset, but the step is not: the
    optimizer goes on with the old momentum. Liu et al. 2025 (arXiv:2505.24864).
    """

    every: float

    def __post_init__(self) -> None:
        _check_every("reset", self.every)

    def describe(self) -> str:
        return f"copy of the policy, renewed every {self.every:g} steps together with the optimizer's state"


@dataclass(frozen=True, slots=True)
class Mixture:
    """Samples from the token-wise geometric mixture policy^(1 - share) reference^share.

    Sampling from it token by token is not the mixture of whole responses, whose normalizer does not factor.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ConfigError(f"mixture.share must be in [0, 1], got {self.share}; 0 is the policy itself")

    def describe(self) -> str:
        return f"samples from policy^{1.0 - self.share:g} reference^{self.share:g}, mixed token by token"


def _check_every(name: str, every: float, key: str = "every") -> None:
    if not every >= 1.0 or every != int(every):
        raise ConfigError(f"{name}.{key} must be a whole number >= 1 of optimizer steps, got {every}; choose one")
