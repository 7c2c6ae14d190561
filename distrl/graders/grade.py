"""What a grader is given of a response, and what it finds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

from distrl.errors import StageError

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem

Verdict = Literal["correct", "wrong", "failed"]

LONGEST_REASON = 300
"""Characters of a reason that are kept: a response may be repeated in it, whatever its length."""


@dataclass(frozen=True, slots=True)
class Grade:
    """What a grader found."""

    reward: float
    """Finite; NaN where the verdict is "failed"."""
    components: Mapping[str, float] = field(default_factory=dict)
    """Named parts of the reward, for the record; finite."""
    verdict: Verdict = "wrong"
    """"failed": the response could not be judged, and `reason` says why."""
    reason: str | None = None
    """Why the verdict is not "correct", where there is more to say than that the answer differs."""


class Response(str):
    """A response's text, with what else is known of it. A plain text stands for one of which nothing is known."""

    rollout_id: str
    """Empty where the response belongs to no run."""
    tokens: int
    """Tokens of the response, its end among them; 0 where they were not counted."""
    max_tokens: int
    """Tokens at which it would have been cut; 0 where that is not known."""
    finish_reason: str
    """`stop` or `length`."""
    turn_rewards: tuple[float, ...]
    """What the environment gave, turn by turn; empty where the response is no episode."""

    __slots__ = ("finish_reason", "max_tokens", "rollout_id", "tokens", "turn_rewards")

    def __new__(
        cls,
        text: str,
        rollout_id: str = "",
        tokens: int = 0,
        max_tokens: int = 0,
        finish_reason: str = "stop",
        turn_rewards: tuple[float, ...] = (),
    ) -> "Response":
        self = super().__new__(cls, text)
        self.rollout_id, self.tokens, self.max_tokens = rollout_id, tokens, max_tokens
        self.finish_reason, self.turn_rewards = finish_reason, turn_rewards
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        values = (self.rollout_id, self.tokens, self.max_tokens, self.finish_reason, self.turn_rewards)
        return Response, (str(self), *values)


GradeResponse = Callable[[str, str, Mapping[str, object]], Grade | float]
"""(response, reference answer, the problem's metadata) -> grade, or a reward."""

Grader = Callable[[Sequence["Problem"], Sequence[str]], Sequence[Grade]]
"""(problems, responses), row by row -> one grade per row."""


def who_failed(name: str, problem: "Problem", response: str) -> str:
    """How messages about a response that could not be graded begin."""
    rollout = f", rollout {response.rollout_id}" if isinstance(response, Response) and response.rollout_id else ""
    return f"grader {name} failed on prompt {problem.prompt_id}{rollout}"


def checked(who: str, part: str, grade: object) -> Grade:
    """The grade that a grader returned, or that of the reward that it returned.

    Args:
        who: grader and prompt, for messages.
        part: name of the component that a bare reward becomes.
    Raises:
        StageError: it is no grade, says that the response could not be judged, or a number is not finite.
    """
    if isinstance(grade, Real):
        reward = float(grade)
        grade = Grade(reward, {part: reward}, "correct" if reward >= 1 else "wrong")
    if not isinstance(grade, Grade):
        raise StageError(f"{who}: it must give a Grade or a number, got {grade!r}")
    if grade.verdict not in get_args(Verdict):
        raise StageError(f"{who}: verdict must be one of {', '.join(get_args(Verdict))}, got {grade.verdict!r}")
    if grade.verdict == "failed":
        raise StageError(f"{who}: {grade.reason}")
    for name, value in (("reward", grade.reward), *grade.components.items()):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise StageError(f"{who}: {name} must be a finite number, got {value!r}")
    if grade.reason is not None and len(grade.reason) > LONGEST_REASON:
        shortened = grade.reason[: LONGEST_REASON - 3] + "..."
        return Grade(grade.reward, grade.components, grade.verdict, shortened)
    return grade


def check_range(who: str, bounds: tuple[float, float], grade: Grade) -> None:
    """
    Raises:
        StageError: the reward is out of its range.
    """
    if not bounds[0] <= grade.reward <= bounds[1]:
        raise StageError(f"{who}: reward must be from {bounds[0]:g} to {bounds[1]:g}, got {grade.reward!r}")


def one_each(name: str, grades: Sequence[Grade], responses: Sequence[str]) -> Sequence[Grade]:
    """The grades, if there is one for each response.

    Raises:
        StageError: there are more or fewer.
    """
    if len(grades) != len(responses):
        raise StageError(f"grader {name}: must return one grade per response ({len(responses)}), got {len(grades)}")
    return grades
