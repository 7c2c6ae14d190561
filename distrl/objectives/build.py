"""Recipes from YAML: axes composed by name, options declared with their range, nothing unknown accepted.

A recipe file is

    source: publication
    status: paper | code | reconstruction
    proves: policy | potential | group
    options: {name: {default, min, choices, help}}
    credit: {rewards: [...], returns: ..., baseline: ..., scale: ...}
    terms: [{name, loss, weights, where, per, divisor, coefficient, self_normalize, when}]

A part is its registered name, or {name: {field: value}}; its fields are those of the class. `$name` stands
for an option's value. A term whose `when` is 0 is left out, and so is what it needs.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from distrl.errors import ConfigError
from distrl.objectives import credit, divergences, losses, ratios, schedules, tapers
from distrl.objectives.recipe import Recipe, Term

REGISTRY: Mapping[type, Mapping[str, type]] = {
    credit.Column: {"stored": credit.Stored},
    credit.Return: {"whole": credit.Whole},
    credit.Baseline: {"constant": credit.Constant, "group_mean": credit.GroupMean},
    credit.Scale: {"one": credit.One, "group_std": credit.GroupStd},
    tapers.Shape: {
        "truncate": tapers.Truncate,
        "signed_truncate": tapers.SignedTruncate,
        "ppo_clip": tapers.PPOClip,
    },
    ratios.Weight: {"ratio": ratios.Ratio},
    losses.Loss: {"score": losses.Score, "divergence": divergences.Divergence},
    schedules.Schedule: {"fixed": schedules.Fixed, "linear": schedules.Linear},
}
"""By axis, the parts that a recipe may name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """A constant of a recipe that a user may set."""

    default: float | str
    min: float | None = None
    choices: tuple[str, ...] = ()
    help: str = ""

    def check(self, name: str, value: object) -> float | str:
        """The value, a float for numbers.

        Raises:
            ConfigError: it has the wrong type or is out of range.
        """
        remedy = f"the default is {self.default!r} ({self.help})"
        if self.choices:
            if value not in self.choices or not isinstance(value, str):
                raise ConfigError(f"{name} must be one of {', '.join(self.choices)}, got {value!r}; {remedy}")
            return value
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
        if number is None or number != number:
            raise ConfigError(f"{name} must be a number, got {value!r}; {remedy}")
        if self.min is not None and number < self.min:
            raise ConfigError(f"{name} must be >= {self.min}, got {value!r}; {remedy}")
        return number


def recipe_names() -> tuple[str, ...]:
    """The recipes that are there, in alphabetical order."""
    folder = resources.files("distrl.objectives") / "recipes"
    return tuple(sorted(x.name.removesuffix(".yaml") for x in folder.iterdir() if x.name.endswith(".yaml")))


def options(name: str) -> Mapping[str, Option]:
    """The options of a recipe, by name.

    Raises:
        ConfigError: there is no such recipe.
    """
    declared = _mapping(f"{name}.options", _document(name).get("options", {}))
    return {option: _option(f"{name}.options.{option}", fields) for option, fields in declared.items()}


def build(name: str, **chosen: float | str) -> Recipe:
    """A recipe with the options that are given, the others at their defaults.

    Args:
        name: one of `recipe_names()`.
        **chosen: values of `options(name)`.

    Raises:
        ConfigError: no such recipe or option, or a value out of range.
    """
    declared = options(name)
    for option, value in chosen.items():
        if option not in declared:
            raise ConfigError(
                f"{name}.{option} is not an option of the recipe {name}, got {value!r}; "
                f"its options are {', '.join(sorted(declared))}"
            )
    values = {
        option: rule.check(f"{name}.{option}", chosen.get(option, rule.default)) for option, rule in declared.items()
    }
    return parse(name, _document(name), values)


def parse(name: str, document: Mapping[str, object], values: Mapping[str, float | str]) -> Recipe:
    """A recipe from the content of its file.

    Args:
        name: what the recipe is called.
        document: the file as YAML gives it.
        values: every option's value.

    Raises:
        ConfigError: a key, a part or an option is unknown, missing or of the wrong type.
    """
    filled = _mapping(name, _fill(name, {k: v for k, v in document.items() if k != "options"}, values))
    terms = []
    for number, node in enumerate(_list(f"{name}.terms", filled.get("terms", []))):
        fields = dict(_mapping(f"{name}.terms[{number}]", node))
        if fields.pop("when", True):
            terms.append(_instance(Term, f"{name}.terms[{number}]", fields))
    if not terms:
        raise ConfigError(f"{name}.terms must have at least one term, got none; add one with loss: score")
    recipe = {**filled, "name": name, "terms": tuple(terms), "options": dict(values)}
    built: Recipe = _instance(Recipe, name, recipe)
    return built


@cache
def _document(name: str) -> Mapping[str, object]:
    if name not in recipe_names():
        raise ConfigError(
            f"objective.recipe must be the name of a recipe, got {name!r}; the recipes are {', '.join(recipe_names())}"
        )
    file = resources.files("distrl.objectives") / "recipes" / f"{name}.yaml"
    return _mapping(name, yaml.safe_load(file.read_text(encoding="utf-8")))


def _option(where: str, node: object) -> Option:
    fields = dict(_mapping(where, node))
    fields["choices"] = tuple(str(x) for x in _list(where, fields.get("choices", [])))
    known = {field.name for field in dataclasses.fields(Option)}
    if not fields.keys() <= known or "default" not in fields:
        raise ConfigError(f"{where} must have a default and may have min, choices and help, got {node!r}; correct it")
    return Option(**fields)


def _fill(where: str, node: object, values: Mapping[str, float | str]) -> object:
    """The node with every `$name` replaced by the option's value."""
    if isinstance(node, str) and node.startswith("$"):
        if node[1:] not in values:
            raise ConfigError(f"{where} refers to the option {node[1:]}, which {where} lacks; declare it under options")
        return values[node[1:]]
    if isinstance(node, dict):
        return {key: _fill(where, value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(where, value, values) for value in node]
    return node


def _instance(cls: type, where: str, fields: Mapping[str, object]) -> Any:
    """A dataclass from its fields, each converted to its annotated type."""
    hints = get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key in fields:
        if key not in known:
            raise ConfigError(
                f"{where}.{key} is not known, got {fields[key]!r}; known here: {', '.join(known) or 'nothing'}"
            )
    for field in known.values():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in fields:
            raise ConfigError(f"{where}.{field.name} must be given, got nothing; known here: {', '.join(known)}")
    return cls(**{key: _convert(hints[key], f"{where}.{key}", value) for key, value in fields.items()})


def _convert(hint: Any, where: str, node: object) -> Any:
    """A YAML value as the annotated type of a field."""
    if type(None) in get_args(hint):
        if node is None:
            return None
        hint = next(arm for arm in get_args(hint) if arm is not type(None))
    if hint in REGISTRY:
        return _part(hint, where, node)
    if get_origin(hint) is Literal:
        if node not in get_args(hint):
            raise ConfigError(f"{where} must be one of {', '.join(get_args(hint))}, got {node!r}; choose one of them")
        return node
    if get_origin(hint) is tuple:
        if isinstance(node, tuple):
            return node
        items = _list(where, node)
        return tuple(_convert(get_args(hint)[0], f"{where}[{i}]", item) for i, item in enumerate(items))
    if get_origin(hint) is not None and issubclass(get_origin(hint), Mapping):
        return dict(_mapping(where, node))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _instance(hint, where, _mapping(where, node))
    if hint is float and isinstance(node, int) and not isinstance(node, bool):
        return float(node)
    if not isinstance(node, hint):
        raise ConfigError(f"{where} must be a {hint.__name__}, got {node!r}; correct the recipe file")
    return node


def _part(axis: type, where: str, node: object) -> Any:
    """A registered part: its name, or {name: {field: value}}."""
    named = {node: {}} if isinstance(node, str) else _mapping(where, node)
    parts = REGISTRY[axis]
    name = str(next(iter(named), ""))
    if len(named) != 1 or name not in parts:
        raise ConfigError(
            f"{where} must be one {axis.__name__.lower()} by name, got {node!r}; known: {', '.join(sorted(parts))}"
        )
    return _instance(parts[name], f"{where}.{name}", _mapping(f"{where}.{name}", named[name]))


def _mapping(where: str, node: object) -> Mapping[str, Any]:
    if not isinstance(node, dict):
        raise ConfigError(f"{where} must be a mapping, got {node!r}; write it as name: value")
    return node


def _list(where: str, node: object) -> list[object]:
    if not isinstance(node, list):
        raise ConfigError(f"{where} must be a list, got {node!r}; start each item with a dash")
    return node
