"""Environments of other packages, as they are."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distrl.environments.protocol import Step
from distrl.errors import ConfigError, StageError
from distrl.graders.forms import rubric_functions

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem


class ReasoningGym:
    """A reasoning-gym task in several attempts: every answer is scored, and one that is not right may be mended.

    Args:
        attempts: answers until the episode ends; its reward is the last one's score.
        hint: what the model reads after an answer that is not right, with `{}` for the score.
    """

    def __init__(self, attempts: int = 2, hint: str = "\nThat is not right. Try again.\n") -> None:
        if attempts < 1:
            raise ConfigError(f"environment.options.attempts must be >= 1, got {attempts}; use 1 for a single answer")
        self._attempts = attempts
        self._hint = hint
        self._problem: Problem | None = None
        self._answers = 0

    def reset(self, problem: "Problem") -> str:
        if "entry" not in problem.metadata:
            raise StageError("the problem must be one of reasoning-gym: set data.source to reasoning_gym")
        self._problem, self._answers = problem, 0
        return ""

    def step(self, message: str) -> Step:
        from distrl.rewards import reasoning_gym

        assert self._problem is not None, "reset comes first"
        self._answers += 1
        score = reasoning_gym(message, self._problem.answer, self._problem.metadata).reward
        done = score >= 1 or self._answers >= self._attempts
        return Step(self._hint.format(score), score if done else 0.0, done)


class Verifiers:
    """A `MultiTurnEnv` of the package verifiers (0.1), see https://github.com/PrimeIntellect-ai/verifiers.

    The environment's own `env_response` and `is_completed` are called with the messages so far and a state of `prompt`,
    `completion`, `answer`, `info`, `task` and `trajectory`; at the end the functions of its rubric are. A function that
    raises fails the episode: the package itself would count 0.

    Args:
        load: `module:function` that makes the environment, or empty for `verifiers.load_environment`.
        arguments: of that function.
    """

    def __init__(self, load: str = "verifiers:load_environment", arguments: Mapping[str, Any] | None = None) -> None:
        from distrl.graders.registry import import_target

        self._environment = import_target(load, "environment.options.load")(**(arguments or {}))
        self._state: dict[str, Any] = {}
        self._prompt: list[dict[str, str]] = []

    async def reset(self, problem: "Problem") -> str:
        messages = [m._asdict() for m in problem.messages] or [{"role": "user", "content": problem.prompt}]
        self._prompt = messages
        self._state = {
            "prompt": messages,
            "completion": [],
            "answer": problem.answer,
            "info": problem.metadata.get("info", dict(problem.metadata)),
            "task": problem.metadata.get("task", ""),
            "trajectory": [],
        }
        await _awaited(getattr(self._environment, "setup_state", _nothing)(self._state))
        return ""

    async def step(self, message: str) -> Step:
        state = self._state
        said = {"role": "assistant", "content": message}
        state["trajectory"].append({"prompt": [*self._prompt, *state["completion"]], "completion": [said]})
        state["completion"] = [*state["completion"], said]
        if not await self._completed():
            answer = await _awaited(self._environment.env_response([*self._prompt, *state["completion"]], state))
            answer = answer[0] if isinstance(answer, tuple) else answer  # older versions return the state, too
            state["completion"] = [*state["completion"], *map(_plain, answer)]
            if not await self._completed():
                return Step("\n".join(str(_plain(m)["content"]) for m in answer), 0.0, False)
        return Step("", await self._score(), True)

    async def _completed(self) -> bool:
        given = {"messages": [*self._prompt, *self._state["completion"]], "state": self._state}
        return bool(await _called(self._environment.is_completed, given))

    async def _score(self) -> float:
        total = 0.0
        for function, weight, objects in rubric_functions(self._environment.rubric):
            if weight:
                given = {**objects, **self._state, "state": self._state}
                total += weight * float(await _called(function, given))
        return total


def _plain(message: Any) -> Mapping[str, Any]:
    return message if isinstance(message, Mapping) else {"role": message.role, "content": message.content}


async def _called(function: Any, objects: Mapping[str, Any]) -> Any:
    """With the arguments that the function names, or all of them where it takes any."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return await _awaited(function(**objects))
    return await _awaited(function(**{name: value for name, value in objects.items() if name in parameters}))


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _nothing(state: Any) -> None:
    return None
