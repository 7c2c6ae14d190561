"""Preferences: the probability that one response beats another, from a function or from a difference of rewards.

A preference function, `module:function`, has the form

    def prefer(first, second, answer, metadata) -> float: ...      # P(first beats second), in [0, 1]

and P(first beats second) + P(second beats first) = 1. A judge that prefers what it reads first does not keep this:
`symmetrize` then asks for both positions and takes the mean.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distrl.errors import ConfigError, StageError
from distrl.graders.registry import import_target

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem

REWARD_DIFFERENCE = "reward_difference"
"""P = 1 / (1 + exp(-(r - r') / scale)) of the run's own rewards: the Bradley-Terry model."""

TOLERANCE = 1e-6

Prefer = Callable[[str, str, str, Mapping[str, object]], float]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One response as it enters a comparison."""

    rollout_id: str
    text: str
    reward: float | None = None
    """Where the preference is one of rewards."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Compares two responses to one prompt.

    Args:
        name: for messages; `prefer` is None for `reward_difference`.
    """

    name: str
    prefer: Prefer | None
    symmetrize: bool
    scale: float

    @property
    def reads_rewards(self) -> bool:
        return self.prefer is None

    def compare(self, problem: "Problem", first: Contestant, second: Contestant) -> float:
        """P(first beats second), in [0, 1]; 1/2 for equal texts.

        Raises:
            StageError: the function raised, left [0, 1], or is not antisymmetric; or a rollout met itself.
        """
        where = f"preference {self.name} on prompt {problem.prompt_id}"
        if first.rollout_id == second.rollout_id:
            raise StageError(f"{where}: rollout {first.rollout_id} must not be compared with itself")
        if self.prefer is None:
            if first.reward is None or second.reward is None:
                raise StageError(f"{where}: both responses must have a reward")
            return 1.0 / (1.0 + math.exp(min((second.reward - first.reward) / self.scale, 700.0)))
        if first.text == second.text:
            return 0.5
        forward, backward = self._ask(where, problem, first, second), self._ask(where, problem, second, first)
        if not self.symmetrize and abs(forward + backward - 1.0) > TOLERANCE:
            raise StageError(
                f"{where}: P(first beats second) + P(second beats first) must be 1, got {forward:g} + {backward:g} for "
                f"rollouts {first.rollout_id} and {second.rollout_id}; mend the function, or set "
                "preference.symmetrize to take the mean of both positions"
            )
        return (forward + 1.0 - backward) / 2.0

    def _ask(self, where: str, problem: "Problem", first: Contestant, second: Contestant) -> float:
        assert self.prefer is not None
        pair = f"rollouts {first.rollout_id} and {second.rollout_id}"
        try:
            value = float(self.prefer(first.text, second.text, problem.answer, problem.metadata))
        except Exception as error:
            raise StageError(f"{where}, {pair}: {type(error).__name__}: {error}") from error
        if not 0.0 <= value <= 1.0:
            raise StageError(f"{where}, {pair}: it must be a probability in [0, 1], got {value:g}")
        return value


def make_judge(name: str, *, symmetrize: bool, scale: float, setting: str = "preference.function") -> Judge:
    """A judge by its name, `reward_difference` or `module:function`.

    Raises:
        ConfigError: there is no such function.
    """
    if name == REWARD_DIFFERENCE:
        return Judge(name, None, symmetrize, scale)
    if ":" not in name:
        raise ConfigError(f"{setting} must be {REWARD_DIFFERENCE} or module:function, got {name!r}; name the function")
    return Judge(name, import_target(name, setting), symmetrize, scale)
