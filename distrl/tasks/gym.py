"""Tasks of the reasoning-gym package, scored by the package's own scorers.

See https://github.com/open-thought/reasoning-gym. An entry travels in its problem's metadata, so that a grader needs
neither the data set nor the index that made it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from distrl.errors import ConfigError, DataError
from distrl.seeding import Purpose, generator
from distrl.tasks.config import DataConfig
from distrl.tasks.problem import Problem, Task

_TRAIN, _HELDOUT = 0, 1
# Entries made for each problem that is asked for: some repeat, and some of the training set are held out.
_SPARE = 4
_TUPLE, _ITEMS = "__tuple__", "__items__"


def load_reasoning_gym(config: DataConfig) -> Task:
    """The task named by `task`; its training questions never occur among the held-out ones.

    Held-out questions are distinct, training questions may repeat. The problems are the same in every process, but
    for the few tasks that iterate over sets of strings (in 0.1.25 isomorphic_strings, knight_swap,
    polynomial_multiplication and ransom_note): these also depend on PYTHONHASHSEED.

    Raises:
        ConfigError: the package is missing, or it does not know the task or an option.
        DataError: the task has too few different questions, or an entry that cannot be carried to a grader.
    """
    name = str(config.task)
    options = config.options or {}
    heldout_size, train_size = config.heldout_size or 256, config.train_size or 2000
    heldout: dict[str, Problem] = {}
    for problem in _problems(name, options, heldout_size * _SPARE, config.seed or 0, _HELDOUT):
        heldout.setdefault(problem.prompt, problem)
        if len(heldout) == heldout_size:
            break
    else:
        raise DataError(
            f"data.heldout_size must be at most the number of different questions, got {heldout_size} but {name} gave "
            f"only {len(heldout)} in {heldout_size * _SPARE} draws; lower it or widen the task by data.options"
        )
    train: list[Problem] = []
    for problem in _problems(name, options, train_size * _SPARE, config.seed or 0, _TRAIN):
        if problem.prompt not in heldout:
            train.append(problem)
        if len(train) == train_size:
            return Task(tuple(train), tuple(heldout.values()), "reasoning_gym")
    raise DataError(
        f"data.train_size must be at most the number of questions that are not held out, got {train_size} but {name} "
        f"gave only {len(train)} in {train_size * _SPARE} draws; lower data.heldout_size or widen the task by "
        "data.options"
    )


def score(response: str, metadata: Mapping[str, object]) -> float:
    """The task's own score in [0, 1] of a response to the problem with this metadata."""
    scorer = _scorer(str(metadata["task"]), json.dumps(metadata["options"]))
    return float(scorer.score_answer(response, unpack(metadata["entry"])))


def pack(value: object) -> object:
    """A value as JSON that `unpack` turns back exactly: JSON has no tuples, and only strings as keys.

    Raises:
        TypeError: the value holds something else than None, bools, numbers, strings, lists, tuples and dicts.
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [pack(v) for v in value]
        case tuple():
            return {_TUPLE: [pack(v) for v in value]}
        case dict() if all(isinstance(k, str) for k in value) and not {_TUPLE, _ITEMS} & value.keys():
            return {k: pack(v) for k, v in value.items()}
        case dict():
            return {_ITEMS: [[pack(k), pack(v)] for k, v in value.items()]}
        case _:
            raise TypeError(f"a {type(value).__name__} cannot be packed as JSON")


def unpack(value: object) -> object:
    """The value that `pack` packed."""
    match value:
        case list():
            return [unpack(v) for v in value]
        case dict() if _TUPLE in value:
            return tuple(unpack(v) for v in value[_TUPLE])
        case dict() if _ITEMS in value:
            return {unpack(k): unpack(v) for k, v in value[_ITEMS]}
        case dict():
            return {k: unpack(v) for k, v in value.items()}
        case _:
            return value


def _problems(name: str, options: Mapping[str, object], size: int, seed: int, split: int) -> Iterator[Problem]:
    # Entry i of a reasoning-gym data set is made from seed + i: nearby seeds would share nearly all entries.
    start = int(generator(seed, Purpose.TASK, split).integers(2**31))
    dataset = _create(name, options, size, start)
    for index in range(size):
        entry = dataset[index]
        try:
            packed = pack(entry)
        except TypeError as error:
            raise DataError(
                f"data.task must have entries of plain values, got {name!r} whose entry {index} does not: {error}; "
                "choose another task"
            ) from error
        # A task that accepts many answers may name none.
        answer = entry["answer"] if isinstance(entry["answer"], str) else ""
        yield Problem.of(entry["question"], answer, {"task": name, "options": dict(options), "entry": packed})


def _create(name: str, options: Mapping[str, object], size: int, seed: int) -> Any:
    package = _package()
    known = sorted(package.factory.DATASETS)
    if name not in known:
        close = get_close_matches(name, known, n=3) or known[:3]
        raise ConfigError(
            f"data.task must be a task of reasoning-gym {version('reasoning-gym')}, got {name!r}; "
            f"close to it are {', '.join(close)}"
        )
    allowed = sorted({f.name for f in fields(package.factory.DATASETS[name][1])} - {"size", "seed"})
    for key in options:
        if key not in allowed:
            raise ConfigError(
                f"data.options.{key} is not an option of {name}, got {options[key]!r}; its options are "
                f"{', '.join(allowed)}"
            )
    try:
        return package.create_dataset(name, size=size, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"data.options must suit the task {name}, got {dict(options)!r} and {size} entries: {error}"
        ) from error


def _package() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            f"data.source reasoning_gym needs the package reasoning-gym, which cannot be imported: {error}; "
            "install it with pip install 'distrl[reasoning-gym]'"
        ) from error
    return reasoning_gym


@lru_cache(maxsize=8)
def _scorer(name: str, options: str) -> Any:
    # A scorer looks at the entry it is given, so that a data set of one entry scores those of any other.
    return _create(name, json.loads(options), 1, 0)
