"""Recipes in words: the data that `distrl recipes` prints, as JSON or as text.

Everything comes from the recipe's file; what a run must produce is read off the recipe as built with its defaults, and
with all options that bring in more.
"""

import textwrap
from collections.abc import Mapping
from importlib import resources
from typing import Any

from distrl.objectives import Option, build, options, recipe_names, required_columns

_NOT_MODELS = frozenset({"rewards", "group"})
_WIDTH = 118


def recipes() -> list[dict[str, Any]]:
    """Every recipe in short, in alphabetical order."""
    return [{key: recipe(name)[key] for key in ("name", "status", "source", "summary")} for name in recipe_names()]


def recipe(name: str) -> dict[str, Any]:
    """One recipe in full, as plain data.

    Raises:
        ConfigError: there is no such recipe.
    """
    built, declared = build(name), options(name)
    needs = required_columns(built)
    return {
        "name": name,
        "status": built.status,
        "source": built.source,
        "proves": built.proves,
        "summary": _summary(name),
        "models": sorted(needs - _NOT_MODELS),
        "columns": sorted(needs & _NOT_MODELS),
        "with_options": _optional(name, declared, needs),
        "terms": [term.name for term in built.terms],
        "options": {option: _option(rule) for option, rule in declared.items()},
    }


def table() -> str:
    """A line per recipe: name, status, source; the summary below it."""
    lines = []
    for row in recipes():
        lines.append(f"{row['name']:<12} {row['status']:<15} {row['source']}")
        lines += textwrap.wrap(row["summary"], _WIDTH, initial_indent=" " * 13, subsequent_indent=" " * 13)
    return "\n".join([*lines, "", "`distrl recipes NAME` lists a recipe's options and what it needs."])


def text(name: str) -> str:
    """One recipe for people."""
    found = recipe(name)
    lines = [name, *textwrap.wrap(found["summary"], _WIDTH), ""]
    for head in ("source", "status", "proves"):
        lines.append(f"{head:<10}{found[head]}")
    lines.append(f"{'models':<10}{', '.join(found['models'])}")
    lines.append(f"{'columns':<10}{', '.join(found['columns'])}")
    for option, needs in found["with_options"].items():
        lines.append(f"{'':<10}with {option}: {', '.join(needs)}")
    lines += ["", "options, set as objective.options.NAME"]
    for option, rule in found["options"].items():
        lines.append(f"  {option} = {rule['default']}{_rule(rule)}: {rule['help']}")
    return "\n".join(lines)


def _summary(name: str) -> str:
    """The comment at the head of the recipe's file."""
    file = resources.files("distrl.objectives") / "recipes" / f"{name}.yaml"
    head: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").strip())
    return " ".join(head)


def _optional(name: str, declared: Mapping[str, Option], needs: frozenset[str]) -> dict[str, list[str]]:
    """By option that is 0 by default, what the recipe needs besides once it is not."""
    added = {
        option: sorted(required_columns(build(name, **{option: 1.0})) - needs)
        for option, rule in declared.items()
        if rule.default == 0.0
    }
    return {option: more for option, more in added.items() if more}


def _option(rule: Option) -> dict[str, Any]:
    return {"default": rule.default, "min": rule.min, "choices": list(rule.choices), "help": rule.help}


def _rule(rule: Mapping[str, Any]) -> str:
    if rule["choices"]:
        return f" ({' or '.join(rule['choices'])})"
    return f" (>= {rule['min']:g})" if rule["min"] is not None else ""
