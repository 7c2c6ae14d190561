"""Comparisons of responses for objectives that read preferences: by a judge, or by a difference of rewards.

P(first beats second) + P(second beats first) = 1. A judge that prefers what it reads first does not keep this: of both
positions the mean is taken, always so for `distrl.judges.JUDGES` and by config for a function.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distrl.errors import StageError
from distrl.judges import JUDGES, Judge, Preference, make_judge, symmetrised

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem

SETTING = "preference.function"

REWARD_DIFFERENCE = "reward_difference"
"""P = 1 / (1 + exp(-(r - r') / scale)) of the run's own rewards: the Bradley-Terry model."""

TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Contestant:
    """One response as it enters a comparison."""

    rollout_id: str
    text: str
    reward: float | None = None
    """Where the preference is one of rewards."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Compares two responses to one prompt.

    Args:
        name: for messages.
        judge: None for `reward_difference`.
        symmetrize: take the mean of both positions; else a judge that is not antisymmetric is an error.
        parallel: how many pairs are asked for at the same time.
    """

    name: str
    judge: Judge | None
    symmetrize: bool
    scale: float
    parallel: int = 1

    @property
    def reads_rewards(self) -> bool:
        return self.judge is None

    def compare_all(self, problem: "Problem", pairs: Sequence[tuple[Contestant, Contestant]]) -> list[Preference]:
        """Of each pair, in its order; errors as for `compare`."""
        if self.parallel == 1:
            return [self.compare(problem, *pair) for pair in pairs]
        with ThreadPoolExecutor(self.parallel, thread_name_prefix="judge") as threads:
            return list(threads.map(lambda pair: self.compare(problem, *pair), pairs))

    def compare(self, problem: "Problem", first: Contestant, second: Contestant) -> Preference:
        """P(first beats second), in [0, 1], 1/2 for equal texts; and how far the two positions are apart.

        Raises:
            StageError: the judge raised, left [0, 1], or is not antisymmetric; or a rollout met itself.
        """
        where = f"preference {self.name} on prompt {problem.prompt_id}"
        if first.rollout_id == second.rollout_id:
            raise StageError(f"{where}: rollout {first.rollout_id} must not be compared with itself")
        if self.judge is None:
            if first.reward is None or second.reward is None:
                raise StageError(f"{where}: both responses must have a reward")
            wins = 1.0 / (1.0 + math.exp(min((second.reward - first.reward) / self.scale, 700.0)))
            return Preference(wins, wins)
        if first.text == second.text:
            return Preference(0.5, 0.5)
        both = f"rollouts {first.rollout_id} and {second.rollout_id}"
        try:
            found = symmetrised(self.judge, problem, first.text, second.text)
        except ValueError as error:
            raise StageError(f"{where}, {both}: {error}") from error
        except Exception as error:
            raise StageError(f"{where}, {both}: {type(error).__name__}: {error}") from error
        if not self.symmetrize and found.disagreement > TOLERANCE:
            raise StageError(
                f"{where}: P(first beats second) + P(second beats first) must be 1, got {found.forwards:g} + "
                f"{1 - found.backwards:g} for {both}; mend the function, or set preference.symmetrize to take the "
                "mean of both positions"
            )
        return found


def make_comparison(config: Any) -> Comparison:
    """As a config's section `preference` says. This loads a model where the judge is one.

    Raises:
        ConfigError, DataError: see `distrl.judges.make_judge`.
    """
    name = config.function
    if name == REWARD_DIFFERENCE:
        return Comparison(name, None, config.symmetrize, config.scale)
    judge = make_judge(name, config.options, setting=SETTING)
    return Comparison(name, judge, config.symmetrize or name in JUDGES, config.scale, config.parallel)
