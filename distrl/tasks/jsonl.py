"""Problems from a file with one JSON object per line."""

import json

from distrl.errors import DataError
from distrl.tasks.config import DataConfig
from distrl.tasks.problem import Problem, Task, content_hash

_FRACTION = 0.1

Numbered = list[tuple[int, Problem]]
"""Problems with the numbers of their lines, from 1."""


def load_jsonl(config: DataConfig) -> Task:
    """The problems of `path`, with those of `heldout_path` or a fraction of `path` held out.

    A fraction is chosen by a hash of each prompt, so that adding lines never moves a prompt to the other split, and
    lines with one prompt share a split. Repeated lines are kept in training and taken once in the held-out problems.

    Raises:
        DataError: a file is missing, empty, not UTF-8, or has a line that is broken; or the splits share a prompt,
            one is empty, or one is smaller than asked for.
    """
    keys = config.prompt_key or "prompt", config.answer_key or "answer"
    train = _read("data.path", config.path or "", *keys)
    if config.heldout_path is not None:
        heldout = _read("data.heldout_path", config.heldout_path, *keys)
        _check_disjoint(train, heldout, config)
    else:
        train, heldout = _split(train, config)
    distinct = {p.prompt_id: p for _, p in heldout}
    return Task(
        _first("data.train_size", [p for _, p in train], config.train_size),
        _first("data.heldout_size", list(distinct.values()), config.heldout_size),
        "exact",
    )


def read_problems(setting: str, path: str, config: DataConfig) -> tuple[Problem, ...]:
    """The distinct problems of one file, in its order, with the keys of `config`.

    Args:
        setting: where the path was set, for messages.
    Raises:
        DataError: the file is missing, empty, not UTF-8, or has a line that is broken.
    """
    numbered = _read(setting, path, config.prompt_key or "prompt", config.answer_key or "answer")
    return tuple({problem.prompt_id: problem for _, problem in numbered}.values())


def _read(setting: str, path: str, prompt_key: str, answer_key: str) -> Numbered:
    problems: Numbered = []
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    problems.append(
                        (number, _parse(f"{setting} {path!r} line {number}", line.rstrip(), prompt_key, answer_key))
                    )
    except OSError as error:
        raise DataError(
            f"{setting} must be a readable file of JSON lines, got {path!r}: {error.strerror}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{setting} must be UTF-8 text, got {path!r}: {error}; convert the file") from error
    if not problems:
        raise DataError(f"{setting} must hold at least one problem, got {path!r}, which is empty; check the path")
    return problems


def _parse(where: str, line: str, prompt_key: str, answer_key: str) -> Problem:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} must be a JSON object, got {_short(line)} ({error.msg} at column {error.colno}); "
            "fix or remove the line"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where} must be a JSON object, got {_short(row)}; fix or remove the line")
    for setting, key in (("data.prompt_key", prompt_key), ("data.answer_key", answer_key)):
        if key not in row:
            found = ", ".join(repr(k) for k in row) or "none"
            raise DataError(f"{where} must have the key {key!r}, got the keys {found}; set {setting}")
        if not isinstance(row[key], str):
            raise DataError(f"{where} must have a string as {key!r}, got {_short(row[key])}; put it in quotes")
    if not row[prompt_key]:
        raise DataError(f"{where} must have a prompt that is not empty, got ''; fix or remove the line")
    return Problem.of(row[prompt_key], row[answer_key])


def _check_disjoint(train: Numbered, heldout: Numbered, config: DataConfig) -> None:
    lines = {problem.prompt: number for number, problem in train}
    for number, problem in heldout:
        if problem.prompt in lines:
            raise DataError(
                f"data.heldout_path must share no prompt with data.path, got line {number} of {config.heldout_path!r} "
                f"equal to line {lines[problem.prompt]} of {config.path!r}; remove one of the two"
            )


def _split(problems: Numbered, config: DataConfig) -> tuple[Numbered, Numbered]:
    fraction = config.heldout_fraction or _FRACTION
    train, heldout = Numbered(), Numbered()
    for number, problem in problems:
        (heldout if content_hash(problem.prompt) < fraction * 2**64 else train).append((number, problem))
    if not train or not heldout:
        raise DataError(
            f"data.heldout_fraction must leave a problem in either split, got {fraction} which holds out "
            f"{len(heldout)} of {len(problems)}; set another fraction, or data.heldout_path"
        )
    return train, heldout


def _first(setting: str, problems: list[Problem], size: int | None) -> tuple[Problem, ...]:
    if size is not None and size > len(problems):
        raise DataError(
            f"{setting} must be at most the number of problems, got {size} but there are {len(problems)}; lower it, "
            "or leave it empty for all"
        )
    return tuple(problems[:size])


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
