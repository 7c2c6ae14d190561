"""Problems from a file with one JSON object per line."""

import json
from collections.abc import Iterator

from distrl.errors import DataError
from distrl.tasks.config import DataConfig
from distrl.tasks.problem import Problem, Task
from distrl.tasks.rows import Row, Rows, distinct_problems, make_task, short


def load_jsonl(config: DataConfig) -> Task:
    """The problems of `path` and `heldout_path`.

    Raises:
        DataError: a file is missing, empty, not UTF-8, or has a line that is broken; or see `make_task`.
    """
    heldout = None if config.heldout_path is None else _rows("data.heldout_path", config.heldout_path)
    return make_task(_rows("data.path", config.path or ""), heldout, config)


def read_problems(setting: str, path: str, config: DataConfig) -> tuple[Problem, ...]:
    """The distinct problems of one file, in its order, with the keys of `config`.

    Args:
        setting: where the path was set, for messages.
    Raises:
        DataError: the file is missing, empty, not UTF-8, or has a line that is broken.
    """
    return distinct_problems(_rows(setting, path), config)


def _rows(setting: str, path: str) -> Rows:
    return Rows(setting, repr(path), "line", _read(setting, path), "put it in quotes")


def _read(setting: str, path: str) -> Iterator[tuple[int, Row]]:
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse(f"{setting} {path!r} line {number}", line.rstrip())
    except OSError as error:
        raise DataError(
            f"{setting} must be a readable file of JSON lines, got {path!r}: {error.strerror}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{setting} must be UTF-8 text, got {path!r}: {error}; convert the file") from error


def _parse(where: str, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} must be a JSON object, got {short(line)} ({error.msg} at column {error.colno}); "
            "fix or remove the line"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where} must be a JSON object, got {short(row)}; fix or remove the line")
    return row
