"""`distrl recipes`: what can be trained, with which options, and what a run has to produce for it."""

import json

import pytest

from deploy.recipes import recipe, recipes, table, text
from distrl.objectives import build, options, recipe_names, required_columns
from tests.deploy.commands import call


def test_every_recipe_is_listed_with_where_it_comes_from() -> None:
    assert [row["name"] for row in recipes()] == list(recipe_names())
    for row in recipes():
        built = build(row["name"])
        assert (row["source"], row["status"]) == (built.source, built.status)
        assert row["summary"]
        assert f"{row['name']:<12} {built.status:<15} {built.source}" in table().splitlines()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_told_with_all_its_options_and_needs(name: str) -> None:
    found, lines = recipe(name), text(name).splitlines()
    assert set(found["models"]) | set(found["columns"]) == required_columns(build(name))
    for option, rule in options(name).items():
        assert found["options"][option]["default"] == rule.default
        assert any(line.startswith(f"  {option} = {rule.default}") and line.endswith(rule.help) for line in lines)
    for option, more in found["with_options"].items():
        assert required_columns(build(name, **{option: 1.0})) == required_columns(build(name)) | set(more)


def test_what_an_option_brings_in_is_told() -> None:
    assert recipe("topr")["with_options"] == {"kl_coefficient": ["reference"]}
    assert "          with kl_coefficient: reference" in text("topr").splitlines()


@pytest.mark.parametrize("arguments", [(), ("grpo",)])
def test_json_is_the_same_data(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "recipes", *arguments, "--json") == 0
    expected = recipe(*arguments) if arguments else recipes()
    assert json.loads(capsys.readouterr().out) == expected
    assert call(monkeypatch, "recipes", *arguments) == 0
    assert capsys.readouterr().out == (text(*arguments) if arguments else table()) + "\n"


def test_an_unknown_recipe_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "recipes", "nothing") == 2
    assert capsys.readouterr().err == (
        "ConfigError: objective.recipe must be the name of a recipe, got 'nothing'; the recipes are "
        f"{', '.join(recipe_names())}\n"
    )
