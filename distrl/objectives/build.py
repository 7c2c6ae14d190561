"""Recipes from YAML: axes composed by name, options declared with their range, nothing unknown accepted.

A recipe file is

    source: publication
    status: paper | code | reconstruction
    proves: policy | potential | group
    summary, formula, note: text
    options: {name: {default, min, choices, help}}
    credit: {rewards: [...], returns: ..., baseline: ..., scale: ..., scale_includes_kl: ...}
    terms: [{name, loss, weights, where, per, divisor, coefficient, self_normalize}]
    anchors: {model: how it is derived}
    upkeep: {model: how the system keeps it}

A part is its registered name, or {name: {field: value}}; its fields are those of the class. `$name` stands
for an option's value. {case: $name, x: ..., y: ...} is the branch that the option chooses, and `when: $name`
in an item of a list or mapping leaves it out where the option is 0. An option that is given and not read by what
is left is refused.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from distrl.errors import ConfigError
from distrl.objectives import (
    baselines,
    columns,
    divergences,
    losses,
    pairs,
    ratios,
    regularized,
    returns,
    schedules,
    tapers,
    upkeep,
)
from distrl.objectives.checks import check_composition
from distrl.objectives.recipe import Recipe, Term

REGISTRY: Mapping[type, Mapping[str, type]] = {
    columns.Column: {
        "stored": columns.Stored,
        "penalty": columns.Penalty,
        "overlong": columns.Overlong,
        "varied_group": columns.VariedGroup,
        "loglinear": columns.Loglinear,
    },
    returns.Return: {
        "whole": returns.Whole,
        "to_go": returns.ToGo,
        "now": returns.Now,
        "gae": returns.GAE,
        "vtrace": returns.VTrace,
    },
    baselines.Baseline: {
        "none": baselines.Constant,
        "constant": baselines.Constant,
        "group_mean": baselines.GroupMean,
        "leave_one_out": baselines.LeaveOneOut,
        "batch_mean": baselines.BatchMean,
        "value": baselines.Value,
        "from_column": baselines.FromColumn,
        "positives": baselines.EffectivePositives,
        "then": baselines.Then,
    },
    baselines.Scale: {"one": baselines.One, "group_std": baselines.GroupStd, "batch_std": baselines.BatchStd},
    tapers.Shape: {
        "truncate": tapers.Truncate,
        "signed_truncate": tapers.SignedTruncate,
        "mask": tapers.Mask,
        "ppo_clip": tapers.PPOClip,
    },
    ratios.Weight: {"ratio": ratios.Ratio},
    divergences.Row: {
        "k2": divergences.K2,
        "k3": divergences.K3,
        "reverse_kl": divergences.ReverseKL,
        "forward_kl": divergences.ForwardKL,
        "js": divergences.JensenShannon,
        "hellinger": divergences.Hellinger,
        "chi2": divergences.ChiSquared,
        "tv": divergences.TotalVariation,
        "alpha": divergences.Alpha,
        "tsallis": divergences.Tsallis,
    },
    losses.Loss: {
        "score": losses.Score,
        "divergence": losses.Divergence,
        "full_divergence": losses.FullDivergence,
        "regression": losses.Regression,
        "value": losses.ValueLoss,
        "regularized": regularized.Regularized,
        "ipo": pairs.IPO,
    },
    schedules.Schedule: {
        "fixed": schedules.Fixed,
        "linear": schedules.Linear,
        "cosine": schedules.Cosine,
        "adaptive": schedules.Adaptive,
    },
    upkeep.Upkeep: {
        "frozen": upkeep.Frozen,
        "ema": upkeep.EMA,
        "snapshot": upkeep.Snapshot,
        "reset": upkeep.Reset,
        "mixture": upkeep.Mixture,
    },
}
"""By axis, the parts that a recipe may name."""

REFUSED: Mapping[str, str] = {
    "k1": "differentiated as a loss it has zero gradient in expectation and regularizes nothing; "
    "use k2, whose gradient is that of the reverse KL, or a recipe with the KL in the reward",
}
"""Names that people look for and that would do nothing, with the reason."""


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
            if str(value) in REFUSED:
                raise ConfigError(
                    f"{name} must be one of {', '.join(self.choices)}, got {value!r}: {REFUSED[str(value)]}"
                )
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
    used: set[str] = set()
    recipe = parse(name, _document(name), values, used)
    for option, value in chosen.items():
        if option not in used and values[option] != declared[option].default:
            raise ConfigError(
                f"{name}.{option} is not read with the other options as they are, got {value!r}; leave it out, "
                f"or turn on what reads it ({declared[option].help})"
            )
    return recipe


def parse(
    name: str, document: Mapping[str, object], values: Mapping[str, float | str], used: set[str] | None = None
) -> Recipe:
    """A recipe from the content of its file.

    Args:
        name: what the recipe is called.
        document: the file as YAML gives it.
        values: every option's value.
        used: receives the names of the options that were read.

    Raises:
        ConfigError: a key, a part or an option is unknown, missing or of the wrong type, or the parts
            contradict each other.
    """
    content = {key: value for key, value in document.items() if key != "options"}
    filled = _mapping(name, _fill(name, content, values, set() if used is None else used))
    nodes = _list(f"{name}.terms", filled.get("terms", []))
    terms = tuple(_convert(Term, f"{name}.terms[{number}]", node) for number, node in enumerate(nodes))
    if not terms:
        raise ConfigError(f"{name}.terms must have at least one term, got none; add one with loss: score")
    built: Recipe = _instance(Recipe, name, {**filled, "name": name, "terms": terms, "options": dict(values)})
    check_composition(built)
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


def _fill(where: str, node: object, values: Mapping[str, float | str], used: set[str]) -> object:
    """The node with options in place of their names, and without the branches that they do not choose."""
    if isinstance(node, str) and node.startswith("$"):
        if node[1:] not in values:
            raise ConfigError(f"{where} refers to the option {node[1:]}, which {where} lacks; declare it under options")
        used.add(node[1:])
        return values[node[1:]]
    if isinstance(node, dict) and "case" in node:
        choice = _fill(where, node["case"], values, used)
        if choice not in node or choice == "case":
            raise ConfigError(f"{where} has no branch {choice!r} for {node['case']}; add it to the case")
        return _fill(where, node[choice], values, used)
    if isinstance(node, dict):
        return {key: _fill(where, value, values, used) for key, value in _present(where, node, values, used).items()}
    if isinstance(node, list):
        numbered = _present(where, dict(enumerate(node)), values, used)
        return [_fill(where, item, values, used) for item in numbered.values()]
    return node


def _present(where: str, items: Mapping[Any, Any], values: Mapping[str, float | str], used: set[str]) -> dict[Any, Any]:
    """The items of a list or mapping whose `when` is not 0, without it."""
    kept = {}
    for key, item in items.items():
        if not isinstance(item, dict) or "when" not in item:
            kept[key] = item
        elif _fill(where, item["when"], values, used):
            kept[key] = {name: value for name, value in item.items() if name != "when"}
    return kept


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
        if isinstance(node, tuple):  # the terms, already converted
            return node
        items = _list(where, node)
        return tuple(_convert(get_args(hint)[0], f"{where}[{i}]", item) for i, item in enumerate(items))
    if get_origin(hint) is not None and issubclass(get_origin(hint), Mapping):
        of = get_args(hint)[1]
        return {key: _convert(of, f"{where}.{key}", value) for key, value in _mapping(where, node).items()}
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
    if name in REFUSED:
        raise ConfigError(f"{where} must be one {axis.__name__.lower()} by name, got {node!r}: {REFUSED[name]}")
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
