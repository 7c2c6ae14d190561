"""What an environment is.

    class Guess:
        def reset(self, problem): return "Guess my number."
        def step(self, message): return ("higher", 0.0, False) if ... else ("", 1.0, True)

One instance plays one episode at a time. Methods may be asynchronous. An environment that raises has failed, and with
it its episode: a failure is never a reward.
"""

import inspect
import math
from collections.abc import Awaitable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol

from distrl.errors import StageError

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem


@dataclass(frozen=True, slots=True)
class Step:
    """What one message of the model led to."""

    observation: str
    """What the model reads next; plays no part where the episode is done."""
    reward: float
    """Of this turn; finite. The episode's reward is the sum."""
    done: bool


class Environment(Protocol):
    """One episode after another."""

    def reset(self, problem: "Problem", /) -> str | Awaitable[str]:
        """Begins an episode.

        Returns:
            What follows the prompt before the model's first message; empty where the prompt says it all.
        """
        ...

    def step(self, message: str, /) -> "tuple[str, float, bool] | Step | Awaitable[Any]":
        """Takes a message of the model.

        Returns:
            (observation, reward, done).
        """
        ...


async def reset(environment: Environment, problem: "Problem") -> str:
    """
    Raises:
        StageError: the environment raised, or gave no text.
    """
    try:
        observation = environment.reset(problem)
        if inspect.isawaitable(observation):
            observation = await observation
    except Exception as error:
        raise _failed(environment, problem, "reset", f"{type(error).__name__}: {error}") from error
    if not isinstance(observation, str):
        raise _failed(environment, problem, "reset", f"it must return a text, got {observation!r}")
    return observation


async def step(environment: Environment, problem: "Problem", message: str) -> Step:
    """
    Raises:
        StageError: the environment raised, or gave something else than a step with a finite reward.
    """
    try:
        answer = environment.step(message)
        if inspect.isawaitable(answer):
            answer = await answer
    except Exception as error:
        raise _failed(environment, problem, "step", f"{type(error).__name__}: {error}") from error
    given = answer
    if isinstance(answer, tuple) and len(answer) == 3:
        answer = Step(*answer)
    if not isinstance(answer, Step) or not isinstance(answer.observation, str):
        raise _failed(environment, problem, "step", f"it must return (observation, reward, done), got {given!r}")
    if not isinstance(answer.reward, Real) or not math.isfinite(answer.reward):
        raise _failed(environment, problem, "step", f"reward must be a finite number, got {answer.reward!r}")
    return Step(answer.observation, float(answer.reward), bool(answer.done))


def _failed(environment: Environment, problem: "Problem", method: str, cause: str) -> StageError:
    return StageError(
        f"environment {type(environment).__name__}.{method} failed on prompt {problem.prompt_id}: {cause}"
    )
