"""From the config's reward section to what the grading stage calls."""

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from distrl.graders.combined import CombinedGrader
from distrl.graders.config import GraderConfig
from distrl.graders.forms import as_grader
from distrl.graders.limited import Backend, LimitedGrader, Limits
from distrl.graders.process import ProcessPool
from distrl.graders.registry import BUILT_IN, import_target, resolve
from distrl.graders.thread import ThreadPool

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_CACHE = 10_000

if TYPE_CHECKING:
    from distrl.config import Config

Graders = Mapping[str, GraderConfig]


def chosen_graders(grader: str | None, graders: Graders, default: str) -> dict[str, GraderConfig]:
    """The run's graders by name.

    Args:
        grader: `reward.grader`. graders: `reward.graders`; at most one of the two is set.
        default: the data source's own.
    """
    if graders:
        return {name: one.model_copy(update={"grader": one.named(name)}) for name, one in graders.items()}
    name = grader or default
    return {name.rpartition(":")[2]: GraderConfig(grader=name)}


def describe(graders: Graders) -> str:
    """The graders on one line; the column `grader` of every rollout."""
    if len(graders) == 1:
        (name, one), *_ = graders.items()
        return one.named(name)
    return " + ".join(f"{one.weight:g} {name}" for name, one in graders.items())


def lowest_reward(graders: Graders) -> float | None:
    """A bound below of the weighted sum; None where one grader has none."""
    total = 0.0
    for name, one in graders.items():
        bounds = range_of(one.named(name), one)
        if bounds is None:
            return None
        total += one.weight * bounds[one.weight < 0]
    return total


def range_of(target: str, config: GraderConfig) -> tuple[float, float] | None:
    if config.range is not None:
        return config.range
    return BUILT_IN[target].range if target in BUILT_IN else None


def build_graders(graders: Graders, concurrency: int, resources: Mapping[str, Any] | None = None) -> CombinedGrader:
    """All graders, combined; must be called where an event loop runs or will run.

    Args:
        concurrency: tickets at a time of a grader that has no number of its own.
        resources: what graders that ask for it get from the run, by the name of their argument.
    Raises:
        ConfigError: there is no such grader, or its options do not suit it.
    """
    made = {name: _limited(name, one, concurrency, resources or {}) for name, one in graders.items()}
    version = " ".join(f"{name}@{grader.content}" for name, grader in made.items() if grader.content)
    return CombinedGrader([(name, graders[name].weight, grader) for name, grader in made.items()], version)


def resources(config: "Config") -> dict[str, Any]:
    """What a run gives to graders that have an argument of this name."""
    return {"sandbox": config.sandbox}


def _limited(name: str, config: GraderConfig, concurrency: int, resources: Mapping[str, Any]) -> LimitedGrader:
    target = config.named(name)
    known = BUILT_IN.get(target)
    setting = f"reward.graders.{name}.grader"
    options = {**config.options, **_wanted(import_target(target, setting), resources)}
    processes = config.processes if config.processes is not None else (known.processes if known else 0)
    backend: Backend
    content = ""
    if processes:
        backend = ProcessPool(target, options, processes)
    else:
        judge = resolve(target, setting, options)
        backend = ThreadPool(target, as_grader(target, judge))
        content = str(getattr(judge, "version", ""))
    cached = DEFAULT_CACHE if known is not None and known.cached else 0
    limits = Limits(
        timeout_s=config.timeout_s or (known.timeout_s if known else None) or DEFAULT_TIMEOUT_S,
        attempts=config.attempts,
        concurrency=config.concurrency or concurrency,
        cached=cached if config.cache is None else config.cache,
        range=range_of(target, config),
    )
    package = version(known.package) if known is not None and known.package else ""
    whole = f"{config.version}/{package}/{content}/{sorted(options.items())!r}"
    return LimitedGrader(target, backend, limits, whole, content)


def _wanted(target: Callable[..., Any], resources: Mapping[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in resources.items() if name in parameters}
