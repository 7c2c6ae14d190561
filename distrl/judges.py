"""Judges say which of two responses is better; whoever compares asks in both orders.

A judge is one of `JUDGES`, or `module:name` of a function of the form

    def prefer(first, second, answer, metadata) -> float: ...      # P(first is better), in [0, 1]

or of a class whose instances are a `Judge`. One that reads no position says so with an attribute `symmetric`, and is
asked once.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from distrl.errors import ConfigError
from distrl.graders.registry import import_target

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem

JUDGES: Mapping[str, str] = {
    "preference_model": "distrl.graders.preference:RewardModelJudge",
    "judge": "distrl.graders.endpoint:Endpoint",
    "served_judge": "distrl.graders.served:ServedModel",
}
"""The judges of the graders of the same names: a reward model, a chat model behind an endpoint, and one that is served
beside the grading actor."""


class Judge(Protocol):
    """Says which of two responses is better."""

    version: str

    def prefer(self, problem: "Problem", first: str, second: str, /) -> float:
        """Probability in [0, 1] that the first is better; 1/2 is a tie.

        Raises:
            StageError, ValueError: there was no answer, or none that can be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class Preference:
    """What a judge said of two responses in both orders."""

    forwards: float
    """That the first is better, where it was read first."""
    backwards: float
    """The same where it was read second."""

    @property
    def probability(self) -> float:
        """That the first is better: the mean of both orders; 1 minus it with the responses exchanged."""
        return (self.forwards + self.backwards) / 2

    @property
    def disagreement(self) -> float:
        """Distance in [0, 1] of the two orders: 1 where the judge looks at the position alone."""
        return abs(self.forwards - self.backwards)


def is_symmetric(judge: Judge) -> bool:
    """Whether the judge says of itself that prefer(x, y) + prefer(y, x) is 1 whatever it reads."""
    return bool(getattr(judge, "symmetric", False))


def symmetrised(judge: Judge, problem: "Problem", first: str, second: str) -> Preference:
    """Asks in both orders, and once where the judge is symmetric: the other answer is known then.

    Raises:
        ValueError: a probability is not one. Whatever the judge raises.
    """
    forwards = _probability(judge.prefer(problem, first, second))
    if is_symmetric(judge):
        return Preference(forwards, forwards)
    backwards = 1.0 - _probability(judge.prefer(problem, second, first))
    return Preference(forwards, backwards)


def _probability(value: float) -> float:
    if not 0.0 <= value <= 1.0:  # NaN, too
        raise ValueError(f"it must be a probability in [0, 1], got {value:g}")
    return float(value)


class FunctionJudge:
    """A function of the user's; see the module."""

    version = ""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def prefer(self, problem: "Problem", first: str, second: str) -> float:
        return float(self._function(first, second, problem.answer, problem.metadata))


def make_judge(name: str, options: Mapping[str, object], *, setting: str) -> Judge:
    """A judge by its name. This loads a model where the judge is one.

    Raises:
        ConfigError: there is none of this name, or its options do not suit it. DataError: its model is not there.
    """
    found = check_judge(name, options, setting=setting)
    if inspect.isclass(found):
        made: Any = found
        return made(**options)  # type: ignore[no-any-return]
    return FunctionJudge(functools.partial(found, **options) if options else found)


def check_judge(name: str, options: Mapping[str, object], *, setting: str) -> Any:
    """What makes the judge: a class or a function, which would accept the options.

    Raises:
        ConfigError: see `make_judge`.
    """
    if name not in JUDGES and ":" not in name:
        known = ", ".join(JUDGES)
        raise ConfigError(
            f"{setting} must be reward_difference, {known} or module:function, got {name!r}; name the function"
        )
    found = import_target(JUDGES.get(name, name), setting)
    takes = inspect.signature(found)
    try:
        if inspect.isclass(found):
            takes.bind(**options)
        else:
            takes.bind("first", "second", "answer", {}, **options)
    except TypeError as error:
        raise ConfigError(
            f"{setting}: the options of {name} must be its arguments, got {dict(options)!r}: {error}; correct them in "
            f"{setting.rpartition('.')[0]}.options"
        ) from error
    return found
