"""Graders by name: the built-in ones with what is known of them, and `module:function` or `module:Class`."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distrl import trl_rewards
from distrl.errors import ConfigError
from distrl.graders.forms import as_grader
from distrl.graders.grade import Grader

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem

UNIT = (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A grader of distrl's."""

    target: str
    """`module:name`, imported when the grader is used."""
    range: tuple[float, float] | None = UNIT
    """Its rewards; None where that depends on its options."""
    processes: int = 0
    """Processes of its own by default, because it may hang; 0 is none."""
    timeout_s: float | None = None
    """Another time limit than the config's default."""
    cached: bool = True
    """Whether the same response to the same problem always has the same grade."""
    package: str | None = None
    """Distribution whose version is part of a cached grade's key."""
    sandboxed: bool = False
    """Whether it runs programs of the model."""
    light: bool = True
    """Whether it can be made in any process, just to see whether its options suit it."""
    needs_answer: bool = True
    """Whether it compares with a reference answer."""


BUILT_IN: Mapping[str, BuiltIn] = {
    "exact": BuiltIn("distrl.rewards:exact"),
    "numeric": BuiltIn("distrl.rewards:numeric"),
    "math_verify": BuiltIn("distrl.rewards:math_verify", processes=2, timeout_s=10.0, package="math-verify"),
    "reasoning_gym": BuiltIn("distrl.rewards:reasoning_gym", package="reasoning-gym"),
    "regex": BuiltIn("distrl.graders.text:Regex", needs_answer=False),
    "json_schema": BuiltIn("distrl.graders.text:JsonSchema", needs_answer=False),
    "format": BuiltIn("distrl.graders.text:Format", needs_answer=False),
    "unit_tests": BuiltIn("distrl.graders.code:UnitTests", timeout_s=100.0, needs_answer=False, sandboxed=True),
    "episode": BuiltIn("distrl.graders.episode:Episode", range=None, cached=False, needs_answer=False),
    "reward_model": BuiltIn(
        "distrl.graders.reward_model:RewardModel", range=None, light=False, timeout_s=100.0, needs_answer=False
    ),
    "preference_model": BuiltIn(
        "distrl.graders.preference:ModelJudge", light=False, timeout_s=100.0, cached=False, needs_answer=False
    ),
    "judge": BuiltIn(
        "distrl.graders.endpoint:EndpointJudge", light=False, timeout_s=100.0, cached=False, needs_answer=False
    ),
    "served_judge": BuiltIn(
        "distrl.graders.served:ServedJudge", light=False, timeout_s=100.0, cached=False, needs_answer=False
    ),
    "length": BuiltIn("distrl.graders.length:Length", range=None, cached=False, needs_answer=False),
    "overlong": BuiltIn("distrl.graders.length:Overlong", range=(-1.0, 0.0), cached=False, needs_answer=False),
}


def importable_from(folder: str) -> None:
    """Lets `module:function` name a module in a folder. Installed packages come first: none of them can be shadowed."""
    if folder not in sys.path:
        sys.path.append(folder)


def make_grader(name: str, *, setting: str = "reward.grader", options: Mapping[str, object] | None = None) -> Grader:
    """A grader by its name.

    Args:
        name: one of `BUILT_IN`, or `module:name` of a function or class in one of the forms of `distrl.graders.forms`.
        setting: dotted name of the config key that holds the name, for messages.
        options: arguments of the class, or further arguments of the function.
    Returns:
        A function that raises StageError with grader and prompt id where a response cannot be judged.
    Raises:
        ConfigError: there is no such grader, or its options do not suit it.
    """
    return as_grader(name, resolve(name, setting, options or {}))


def resolve(name: str, setting: str, options: Mapping[str, object]) -> Any:
    """The object that judges: an instance of a class, or the function with its options."""
    found = import_target(name, setting)
    if inspect.isclass(found):
        try:
            return found(**options)
        except TypeError as error:
            raise _bad_options(name, setting, options, error) from error
    if not options:
        return found
    allowed = inspect.signature(found).parameters
    unknown = [key for key in options if key not in allowed]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in allowed.values()):
        raise ConfigError(
            f"{setting}: the options of {name} must be among its arguments ({', '.join(allowed)}), got "
            f"{', '.join(unknown)}; remove them"
        )
    return functools.partial(found, **options)


def check_options(name: str, options: Mapping[str, object], *, setting: str) -> None:
    """Refuses options that a grader does not take, without making what takes time or a device.

    Raises:
        ConfigError: names them.
    """
    found = import_target(name, setting)
    if not inspect.isclass(found) or (name in BUILT_IN and BUILT_IN[name].light):
        resolve(name, setting, options)
        return
    try:
        inspect.signature(found).bind_partial(**options)
    except TypeError as error:
        raise _bad_options(name, setting, options, error) from error


def _bad_options(name: str, setting: str, options: Mapping[str, object], error: Exception) -> ConfigError:
    return ConfigError(
        f"{setting}: the options of {name} must be the arguments of its class, got {dict(options)!r}: {error}; "
        "correct them in its options"
    )


def check_columns(name: str, problem: "Problem", *, setting: str = "reward.grader") -> None:
    """Refuses a TRL reward function that needs a column that the data does not have.

    Args:
        name: of a grader that `make_grader` accepts.
        problem: any of the data.
    Raises:
        ConfigError: names the columns.
    """
    if name in BUILT_IN:
        return
    function = import_target(name, setting)
    columns = trl_rewards.columns_of(problem)
    if trl_rewards.is_reward_function(function) and (missing := trl_rewards.missing_columns(function, columns)):
        raise ConfigError(
            f"{setting} {name} must be given every argument that it needs, got none for {', '.join(missing)}; the "
            f"columns of the data are {', '.join(columns)}: name the others in data.columns, or give the arguments "
            "defaults"
        )


def import_target(name: str, setting: str) -> Callable[..., Any]:
    """What a name stands for.

    Raises:
        ConfigError: there is nothing of this name, or it cannot be called.
    """
    path = BUILT_IN[name].target if name in BUILT_IN else name
    module, colon, function = path.partition(":")
    if not colon:
        raise ConfigError(
            f"{setting} must be one of {', '.join(BUILT_IN)} or module:function, got {name!r}; "
            "name the function as my_package.my_module:my_grader"
        )
    try:
        found: object = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{setting} must name a function that can be imported, got {name!r}: {error}; "
            "check the name and that its package is installed"
        ) from error
    judges = callable(found) or hasattr(found, "score_answer") or hasattr(found, "funcs")
    if not judges:
        raise ConfigError(f"{setting} must name a function, got {name!r}, which is of type {type(found).__name__}")
    return found  # type: ignore[return-value]
