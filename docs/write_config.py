"""Writes docs/config.md from the config's models, so that the page says what the code checks.

python docs/write_config.py
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distrl.config import Config
from distrl.graders.config import GraderConfig
from distrl.objectives import Option, options, recipe_names

PAGE = Path(__file__).with_name("config.md")

_TYPES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    bool: "boolean",
    object: "any value",
    Any: "any value",
}
_TYPES[GraderConfig] = "grader"
_SIGNS = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}

_HEAD = """\
# The config

Written by `docs/write_config.py` from the models in `distrl/config.py` and its sections, mostly in
`distrl/config_sections.py`; change those and run `python docs/write_config.py`.

A run is one YAML file of sections and keys. The sections `model`, with `model.path`, and `data` have to be there;
everything else has a default. On the command line `section.key=value` overrides the file, in order, the last one wins;
the value is YAML.

    distrl validate examples/sort_digits.yaml model.path=models/mine train.steps=20
    distrl train examples/sort_digits.yaml model.path=models/mine train.betas='[0.9, 0.99]'

An unknown key is refused, and so is a value that breaks its rule; the message has the key, the rule and the value.
Relative paths count from the directory in which the command was called. A key whose default is `empty` is left empty
by omitting it or by `section.key=`. The config that a run used, every key resolved, is `config.yaml` in its directory.

Durations end in `_s` and are seconds; sizes end in `_bytes`.

## Rules between keys

- `generation.slots` is at least `rollout.group_size`: the responses of a ticket are sampled together.
- A key of `data` that `data.source` does not use stays empty; see the table there.
- `evaluation.problems` is at most the number of held-out problems.
- `reference.path` stays empty where the objective reads no reference model.
- `objective.options` are options of `objective.recipe`; see [Options of the recipes](#options-of-the-recipes).
- `reward.grader` and `reward.graders` are not both set.
- A recipe is refused that could push no response down, or whose baseline is the mean of a group of one response.
"""


def render() -> str:
    """The whole page."""
    parts = [_HEAD, "## Top level\n\n" + _table(Config, "")]
    for name, section in _sections():
        parts.append(f"## {name}\n\n{inspect.cleandoc(section.__doc__ or '')}\n\n{_table(section, f'{name}.')}")
    graders = f"## reward.graders.NAME\n\n{inspect.cleandoc(GraderConfig.__doc__ or '')}\n\n"
    parts.append(graders + _table(GraderConfig, "reward.graders.NAME."))
    recipes = [f"### {name}\n\n{_options(options(name))}" for name in recipe_names()]
    return "\n".join([*parts, "## Options of the recipes\n\nKeys of `objective.options`.\n", *recipes])


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, field.annotation


def _table(section: type[BaseModel], prefix: str) -> str:
    sections = dict(_sections())
    rows = [("Key", "Type", "Default", "Rule", "Meaning")]
    for name, field in section.model_fields.items():
        if prefix or name not in sections:
            rows.append((f"`{prefix}{name}`", _type(field.annotation), _default(field), _rule(field), _meaning(field)))
    return _markdown(rows)


def _options(declared: Mapping[str, Option]) -> str:
    rows = [("Option", "Type", "Default", "Rule", "Meaning")]
    for name, option in declared.items():
        kind = "text" if option.choices else "number"
        rule = _one_of(option.choices)
        if option.min is not None:
            rule = f">= {option.min:g}"
        rows.append((f"`{name}`", kind, f"`{_plain(option.default)}`", rule, _cell(option.help)))
    return _markdown(rows)


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row).replace("|  |", "| |") + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def _type(annotation: Any) -> str:
    """The annotation in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, UnionType):
        # Optional keys: that they may be empty is told by their default.
        return " or ".join(dict.fromkeys(_type(a) for a in arguments if a is not type(None)))
    if origin is Literal:
        return _type(type(arguments[0]))
    if origin is tuple:
        return f"list of {len(arguments)} {_type(arguments[0])}s"
    if origin is not None and len(arguments) == 2:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    return _TYPES[annotation]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return "empty" if field.default is None else f"`{_plain(field.default)}`"


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return str(list(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rule(field: FieldInfo) -> str:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    rules = [_one_of(choices)] if choices else []
    parts = list(field.metadata)
    if get_origin(field.annotation) is tuple:
        # Of a list every member has the same rule.
        parts += [x for info in get_args(get_args(field.annotation)[0])[1:] for x in info.metadata]
    for part in parts:
        if type(part) in _SIGNS:
            bound = getattr(part, type(part).__name__.lower())
            rules.append(f"{_SIGNS[type(part)]} {bound}")
        elif pattern := getattr(part, "pattern", None):
            rules.append(f"matches `{pattern}`")
    return ", ".join(rules)


def _one_of(choices: Sequence[object]) -> str:
    return " or ".join(f"`{choice}`" for choice in choices)


def _meaning(field: FieldInfo) -> str:
    return _cell(field.description or "")


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def main() -> None:
    PAGE.write_text(render())


if __name__ == "__main__":
    main()
