"""A commented config to start from; every comment is the description that the config's models give."""

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from deploy.config_schema import schema_reference
from deploy.starter_tasks import TaskName
from distrl.config import Config
from distrl.errors import RefusedError

Values = Mapping[str, Mapping[str, Any]]

FILL_IN = "  # fill in"
"""Ends the line of a key that has no default; what the line lacks is the value."""

_WIDTH = 112

_KEYS: Mapping[str, tuple[str, ...]] = {
    "run": ("name", "dir", "seed"),
    "rollout": ("group_size", "max_new_tokens", "temperature"),
    "generation": ("actors", "slots"),
    "reward": ("grader",),
    "grading": ("actors", "concurrency"),
    "reference": ("path", "actors"),
    "train": (
        *("steps", "tickets_per_step", "max_staleness", "on_stale", "learning_rate", "max_grad_norm"),
        *("micro_batch_tokens", "checkpoint_every_steps"),
    ),
    "limits": ("start_timeout_s", "stall_warning_s"),
}
"""Keys that people change, by section; the other keys of these sections are named in one line. Of a section that is
not here every key is written."""

_TASKS: Mapping[TaskName, Values] = {
    "sort_digits": {
        "data": {"source": "sort_digits", "heldout_size": 1024, "seed": 0, "options": {"digits": 8}},
        "rollout": {"max_new_tokens": 10},
    },
    "jsonl": {
        "data": {
            "source": "jsonl",
            "path": None,
            "heldout_path": None,
            "heldout_fraction": None,
            "prompt_key": "prompt",
            "answer_key": "answer",
        },
        "evaluation": {"problems": 100, "problems_during": 100},
    },
    "reasoning_gym": {
        "data": {
            "source": "reasoning_gym",
            "task": "basic_arithmetic",
            "train_size": 2000,
            "heldout_size": 256,
            "seed": 0,
            "options": {},
        },
        "evaluation": {"problems": 256, "problems_during": 128},
    },
}
"""By task, what differs from the defaults; of the data section, the keys that are written."""

_REQUIRED = {("model", "path"), ("data", "path")}


def write_starter(path: Path, task: TaskName) -> None:
    """Writes the config to a new file.

    Raises:
        RefusedError: the file exists, or its folder cannot be written to.
    """
    text = starter(path, task)
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise RefusedError(
            f"PATH: {path} must not exist yet, init never overwrites a file; choose another name or delete it"
        ) from None
    except OSError as error:
        raise RefusedError(f"PATH: {path} cannot be written: {error.strerror}; choose another place") from error


def starter(path: Path, task: TaskName) -> str:
    """The text of a config for a file in this place; valid once the lines that end in `FILL_IN` have a value."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-")
    values: Values = {**_TASKS[task], "run": {"name": stem or "run"}}
    lines = [
        f"# yaml-language-server: $schema={schema_reference(path)}",
        f"# A config for distrl, written by `distrl init --task {task}`. A key that is left out has its default.",
        "#",
        f"#     distrl validate {path.name}    says in words what it would run",
        f"#     distrl train {path.name}       runs it",
    ]
    for name, field in Config.model_fields.items():
        lines.append("")
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            lines += _section(name, section, values.get(name, {}))
        else:
            lines += [*_comment(field.description or "", ""), f"{name}: {_yaml(field.default)}"]
    return "\n".join(lines) + "\n"


def _section(name: str, section: type[BaseModel], values: Mapping[str, Any]) -> Iterator[str]:
    keys = tuple(values) if name == "data" else _KEYS.get(name, tuple(section.model_fields))
    summary = (section.__doc__ or "").partition("\n")[0]
    others = [key for key in section.model_fields if key not in keys]
    if others and name != "data":  # there, most others belong to other sources
        summary += f" More keys: {', '.join(others)}."
    yield from _comment(summary, "")
    yield f"{name}:"
    for key in keys:
        field = section.model_fields[key]
        yield from _comment(field.description or "", "  ")
        value = values.get(key, None if field.is_required() else field.default)
        empty = FILL_IN if value is None and (name, key) in _REQUIRED else ""
        yield f"  {key}: {_yaml(value)}".rstrip() + empty


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _yaml(value: Any) -> str:
    """A value on one line; nothing for None."""
    if value is None:
        return ""
    plain = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
