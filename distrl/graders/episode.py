"""The reward of an episode: what its environment gave."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distrl.errors import StageError
from distrl.graders.grade import Grade, Response, who_failed

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem


class Episode:
    """The sum of the rewards of all turns; correct from `success` on.

    Args:
        success: smallest sum that counts as correct.
    """

    def __init__(self, success: float = 1.0) -> None:
        self._success = success

    def __call__(self, problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        return [self._grade(p, r) for p, r in zip(problems, responses, strict=True)]

    def _grade(self, problem: "Problem", response: str) -> Grade:
        if not isinstance(response, Response) or not response.turn_rewards:
            raise StageError(f"{who_failed('episode', problem, response)}: the response must be an episode")
        total = sum(response.turn_rewards)
        components = {"episode": total, "turns": float(len(response.turn_rewards))}
        reason = None if response.finish_reason == "stop" else "cut at the limit of tokens or turns"
        return Grade(total, components, "correct" if total >= self._success else "wrong", reason)
