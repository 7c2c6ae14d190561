"""Recipes in words: what they optimize, what they are made of, what a run has to produce for them.

Everything is read from the recipe itself, apart from its formula and summary. `recipes` and `recipe` give
plain data for JSON, `table` and `text` the same for people.
"""

import dataclasses
import math
import textwrap
from collections.abc import Mapping
from typing import Any

from distrl.objectives.build import REGISTRY, Option, build, options, recipe_names
from distrl.objectives.columns import Penalty
from distrl.objectives.losses import Divergence
from distrl.objectives.ratios import Ratio
from distrl.objectives.recipe import Recipe, Term
from distrl.objectives.regularized import Regularized
from distrl.objectives.roles import producer, shape, tensor

CLASSES = {
    "policy": "the expected gradient is that of the stated objective under the policy",
    "potential": "the expected gradient is that of E_mu[sum_t A_t H(r_t)], H' = weight / r, at fixed credits A",
    "group": "the expected gradient over whole groups is a known multiple of, or a loop over, its definition",
}
"""What the tests prove, by class."""

NAMES = {part: name for parts in REGISTRY.values() for name, part in parts.items()}


def recipes() -> list[dict[str, Any]]:
    """Every recipe in short, in alphabetical order: name, class, status, source, summary."""
    built = [build(name) for name in recipe_names()]
    return [
        {
            "name": x.name,
            "class": x.proves,
            "status": x.status,
            "source": x.source,
            "summary": x.summary,
        }
        for x in built
    ]


def recipe(name: str, **chosen: float | str) -> dict[str, Any]:
    """One recipe in full.

    Args:
        name: one of `recipe_names()`.
        **chosen: options; composition, columns and upkeep are those with them.

    Returns:
        Plain data; infinite numbers are the text "inf", which JSON has no number for.

    Raises:
        ConfigError: no such recipe or option, or a value out of range.
    """
    built = build(name, **chosen)
    return {
        "name": name,
        "summary": built.summary,
        "formula": built.formula,
        "class": built.proves,
        "proves": CLASSES[built.proves],
        "status": built.status,
        "note": built.note,
        "source": built.source,
        "sampler": "any, corrected by ratios" if _corrects(built) else "the policy itself",
        "credit": _credit(built),
        "terms": {term.name: _term(term) for term in built.terms},
        "columns": [
            {"name": tensor(x), "shape": shape(x), "from": producer(x)} for x in sorted(built.needs, key=tensor)
        ],
        "derived": {model: _part(how) for model, how in built.anchors.items()},
        "roles": roles(built),
        "upkeep": {model: how.describe() for model, how in built.upkeep.items()},
        "options": {
            option: _option(rule) | {"value": _plain(built.options[option])} for option, rule in options(name).items()
        },
    }


def roles(built: Recipe) -> list[str]:
    """The parts of a run that a recipe asks for, in alphabetical order."""
    opponent = built.upkeep.keys() & {"opponent"}
    return sorted({"generator", *(producer(name) for name in built.needs)} | opponent)


def table() -> str:
    """What `distrl recipes` prints: a line per recipe, with what is reconstructed marked."""
    rows = [(x["name"], x["class"], x["status"], x["summary"]) for x in recipes()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = []
    for row in rows:
        start = "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)) + "  "
        lines.append(textwrap.fill(row[3], 118, initial_indent=start, subsequent_indent=" " * len(start)))
    return "\n".join(lines)


def text(name: str, **chosen: float | str) -> str:
    """What `distrl recipes NAME` prints."""
    found = recipe(name, **chosen)
    lines = [name, "", *textwrap.wrap(found["summary"], 110), ""]
    heads = ("formula", "class", "status", "note", "source", "sampler", "credit")
    for head in heads:
        value = f"{found[head]}: {found['proves']}" if head == "class" else found[head]
        lines += _entry(head, value)
    for term, composition in found["terms"].items():
        lines += _entry(f"term {term}", composition)
    for column in found["columns"]:
        lines += _entry("column" if column is found["columns"][0] else "", _column(column))
    for model, how in found["derived"].items():
        lines += _entry("derived", f"{model} by {how}")
    lines += _entry("roles", ", ".join(found["roles"]))
    for model, how in found["upkeep"].items():
        lines += _entry("upkeep", f"{model}: {how}")
    for option, rule in found["options"].items():
        value = f"{option} = {rule['value']}{_range(rule)}: {rule['help']}"
        lines += _entry("option" if option == next(iter(found["options"])) else "", value)
    return "\n".join(lines)


def _entry(head: str, value: str) -> list[str]:
    start = head.ljust(14)
    return textwrap.wrap(value, 110, initial_indent=start, subsequent_indent=" " * 14) if value else []


def _column(column: Mapping[str, str]) -> str:
    return f"{column['name']} {column['shape']} from the {column['from']}"


def _range(rule: Mapping[str, Any]) -> str:
    if rule["choices"]:
        return f" ({', '.join(rule['choices'])})"
    return f" (>= {rule['min']:g})" if rule["min"] is not None else ""


def _option(rule: Option) -> dict[str, Any]:
    return {
        "default": _plain(rule.default),
        "min": rule.min,
        "choices": list(rule.choices),
        "help": rule.help,
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _corrects(built: Recipe) -> bool:
    return any("behavior" in ratio.over for term in built.terms for ratio in term.ratios if term.loss.unit == "token")


def _credit(built: Recipe) -> str:
    credit = built.credit
    if not credit.rewards:
        return "none"
    rewards = " + ".join(_part(column) for column in credit.rewards).replace("+ -", "- ")
    returns = f"{_part(credit.returns)}({rewards})"
    if _part(credit.baseline) != "constant(0)":
        returns = f"{returns} - {_part(credit.baseline)}"
    return returns if _part(credit.scale) == "one" else f"({returns}) / {_part(credit.scale)}"


def _term(term: Term) -> str:
    factors = [*(_part(weight) for weight in term.weights), _part(term.loss)]
    pieces = [" * ".join(factors)]
    pieces.append("mean over pairs" if term.loss.unit == "pair" else f"per {term.per}")
    if term.where is not None:
        pieces.append(f"where {_part(term.where)}")
    if term.divisor != 1.0:
        pieces.append(f"divided by {term.divisor:g}")
    if term.self_normalize:
        pieces.append("weights divided by their mean")
    coefficient = _part(term.coefficient)
    return (f"{coefficient} * " if coefficient != "1" else "") + ", ".join(pieces)


def _part(part: Any) -> str:
    """A part as the recipe file names it, with its constants."""
    if isinstance(part, Ratio):
        return f"{_part(part.shape)} of {part.level} {_anchor(part.of)} / {_anchor(part.over)}"
    if isinstance(part, Penalty):
        return f"-{_part(part.coefficient)} log({_anchor(part.of)} / {_anchor(part.over)})"
    if isinstance(part, Regularized):
        against = f"{_part(part.divergence)} to {_anchor(part.anchor)}"
        return f"regularized({part.form}, {part.coefficient:g} * {against}, {_part(part.ratio)})"
    if isinstance(part, Divergence):
        return f"{_part(part.estimator)} to {_anchor(part.anchor)}"
    name = NAMES[type(part)]
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    shown = [field if value is True else _constant(value) for field, value in values.items() if value is not False]
    if name == "fixed":
        return shown[0]
    if name == "then":
        return " - ".join(shown)
    if name in ("gae", "vtrace", "to_go"):
        return f"{name}[{', '.join(shown)}]"
    if name == "stored":
        return str(values["name"])
    return f"{name}({', '.join(shown)})" if shown else name


def _constant(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return _part(value)
    if isinstance(value, Mapping):
        return _anchor(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _anchor(anchor: Mapping[str, float]) -> str:
    return " ".join(name if power == 1.0 else f"{name}^{power:g}" for name, power in anchor.items())
