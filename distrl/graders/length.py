"""Graders of a response's length, in tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distrl.errors import ConfigError, StageError
from distrl.graders.grade import Grade, Response, who_failed

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem


class Length:
    """A reward in proportion to the response's tokens: `per_token` times their number, never beyond `limit`.

    Args:
        per_token: reward of one token; negative prefers short responses.
        limit: largest absolute reward.
    """

    def __init__(self, per_token: float = -0.001, limit: float = 1.0) -> None:
        if limit < 0:
            raise ConfigError(f"options.limit of the grader length must be >= 0, got {limit}; give the largest size")
        self._per_token = per_token
        self._limit = limit

    def __call__(self, problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        return [self._grade(p, r) for p, r in zip(problems, responses, strict=True)]

    def _grade(self, problem: "Problem", response: str) -> Grade:
        tokens = _counted("length", problem, response).tokens
        reward = max(-self._limit, min(self._limit, self._per_token * tokens))
        return Grade(reward, {"length": reward, "tokens": float(tokens)}, "correct")


class Overlong:
    """DAPO's soft punishment of overlong responses (arXiv 2503.14476, equation 13), from 0 down to -1.

    With n tokens, a longest length L and a margin C:

        0               where n <= L - C
        (L - C - n) / C where L - C < n <= L
        -1              where n > L

    The margin is where the punishment sets in. A response that is cut at L without an end has n = L, and -1.

    Args:
        margin: C, tokens >= 1.
        longest: L, tokens; 0 takes the length at which responses are cut.
    """

    def __init__(self, margin: int, longest: int = 0) -> None:
        if margin < 1 or longest < 0:
            raise ConfigError(
                f"grader overlong: options.margin must be >= 1 and options.longest >= 0, got {margin} and {longest}; "
                "give them in tokens"
            )
        self._margin = margin
        self._longest = longest

    def __call__(self, problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        return [self._grade(p, r) for p, r in zip(problems, responses, strict=True)]

    def _grade(self, problem: "Problem", response: str) -> Grade:
        known = _counted("overlong", problem, response)
        longest = self._longest or known.max_tokens
        if longest < self._margin:
            raise StageError(
                f"{who_failed('overlong', problem, response)}: the longest length must be >= options.margin "
                f"({self._margin}), got {longest}"
            )
        reward = max(-1.0, min(0.0, (longest - self._margin - known.tokens) / self._margin))
        reason = None if reward == 0 else f"{known.tokens} tokens of at most {longest}"
        return Grade(reward, {"overlong": reward}, "wrong" if reward else "correct", reason)


def _counted(name: str, problem: "Problem", response: str) -> Response:
    if not isinstance(response, Response) or not response.tokens:
        raise StageError(
            f"{who_failed(name, problem, response)}: it needs the number of tokens, which only a run and eval count"
        )
    return response
