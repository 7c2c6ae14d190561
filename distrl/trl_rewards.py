"""Reward functions in the form of TRL, as they are.

    def reward(completions, prompts, ground_truth, **kwargs) -> list[float]: ...

See https://huggingface.co/docs/trl/main/en/reward_customization. A function gets `completions`, `prompts`, and a list
for every column of the data under the column's name, all of the same length; without `**kwargs` only those that it
names. For a prompt that is a text, completions are texts; for a conversation, a prompt is a list of messages and a
completion a list of one assistant message. Other than in TRL there are no token ids and no trainer, a reward of None is
a failure, and functions are called in threads, where signals (math-verify's time limits) do not work.
"""

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem

RewardFunction = Callable[..., Any]

_GIVEN = ("completions", "prompts")


def is_reward_function(function: Callable[..., Any]) -> bool:
    """Whether a function has TRL's form: a parameter named `completions`."""
    try:
        return "completions" in inspect.signature(function).parameters
    except ValueError:  # Some functions written in C have no signature.
        return False


def missing_columns(function: RewardFunction, columns: Iterable[str]) -> list[str]:
    """Parameters that the function needs and that would not be given."""
    given = {*_GIVEN, *columns}
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in given
    ]


def columns_of(problem: "Problem") -> dict[str, object]:
    """What a reward function is given of a problem beside its prompt: the answer, and the metadata by their names."""
    return {"answer": problem.answer, **problem.metadata}


def call(function: RewardFunction, problems: Sequence["Problem"], responses: Sequence[str]) -> list[object]:
    """The rewards as the function returned them, one per response.

    Raises:
        TypeError: it returned something else than a sequence. ValueError: of another length.
        Whatever the function raises.
    """
    rows = [columns_of(problem) for problem in problems]
    names = dict.fromkeys(name for row in rows for name in row)
    arguments: dict[str, object] = {name: [row.get(name) for row in rows] for name in names}
    arguments["prompts"] = [[m._asdict() for m in p.messages] if p.messages else p.prompt for p in problems]
    arguments["completions"] = [
        [{"role": "assistant", "content": text}] if problem.messages else text
        for problem, text in zip(problems, responses, strict=True)
    ]
    rewards = function(**_accepted(function, arguments))
    if inspect.iscoroutine(rewards):
        rewards = asyncio.run(_awaited(rewards))
    try:
        found = list(rewards)
    except TypeError:
        raise TypeError(f"it must return a list of rewards, got {rewards!r}") from None
    if len(found) != len(responses):
        raise ValueError(f"it must return one reward per completion ({len(responses)}), got {len(found)}")
    return found


def _accepted(function: RewardFunction, arguments: Mapping[str, object]) -> Mapping[str, object]:
    """All arguments for a function with `**kwargs`, else those that it names."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


async def _awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await coroutine
