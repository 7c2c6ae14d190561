"""`distrl recipes` prints what `distrl.objectives.describe` says."""

import json

import pytest

from distrl.objectives import describe, recipe_names
from tests.deploy.commands import call


@pytest.mark.parametrize("arguments", [(), ("grpo",)])
def test_text_for_people_and_json_for_programs(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "recipes", *arguments, "--json") == 0
    expected = describe.recipe(*arguments) if arguments else describe.recipes()
    assert json.loads(capsys.readouterr().out) == expected
    assert call(monkeypatch, "recipes", *arguments) == 0
    assert capsys.readouterr().out == (describe.text(*arguments) if arguments else describe.table()) + "\n"


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_printed_as_json(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "recipes", name, "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == name


def test_an_unknown_recipe_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "recipes", "nothing") == 2
    assert capsys.readouterr().err == (
        "ConfigError: objective.recipe must be the name of a recipe, got 'nothing'; the recipes are "
        f"{', '.join(recipe_names())}\n"
    )
