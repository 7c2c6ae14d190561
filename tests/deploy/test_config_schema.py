"""The schema that editors read says what the code checks."""

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.config_schema import config_schema, render, schema_path, schema_reference
from deploy.quickstart import CONFIG
from distrl.config import Config, make_config
from distrl.errors import ConfigError
from distrl.objectives import recipe_names
from tests.deploy.commands import call

ROOT = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = {"model": {"path": "m"}, "data": {"source": "sort_digits"}}


def test_the_file_in_docs_is_the_schema_of_the_code() -> None:
    expected = "run distrl schema > docs/config.schema.json"
    assert (ROOT / "docs/config.schema.json").read_text() == render(), expected


def test_the_command_prints_the_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "schema") == 0
    assert capsys.readouterr().out == schema_path().read_text()


def test_the_schema_is_the_same_wherever_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = render()
    monkeypatch.chdir(tmp_path)
    assert render() == before
    assert str(ROOT) not in before


def test_every_key_is_described() -> None:
    schema = config_schema()
    sections = [schema, *schema["$defs"].values()]
    undescribed = [
        name
        for section in sections
        for name, key in section["properties"].items()
        if not key.get("description") and "$ref" not in key
    ]
    assert undescribed == []
    assert all(section["description"] for section in sections)
    assert [section["title"] for section in sections if section["additionalProperties"]] == []


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"train": {"steps": 3, "betas": [0.9, 0.99]}},
        {"objective": {"recipe": recipe_names()[0], "options": {"kl_coefficient": 0.1}}},
        {"reward": {"grader": None}},
        {"train": {"stepz": 3}},
        {"train": {"steps": 0}},
        {"train": {"steps": "many"}},
        {"train": {"betas": [0.9, 1.0]}},
        {"train": {"on_stale": "drop"}},
        {"run": {"seed": 2**32}},
        {"run": {"name": "a b"}},
        {"model": {}},
        {"limits": None},
    ],
    ids=str,
)
def test_schema_and_code_agree(change: dict[str, Any]) -> None:
    values = {**MINIMAL, **change}
    try:
        make_config(values)
    except ConfigError:
        valid = False
    else:
        valid = True
    assert jsonschema.Draft202012Validator(config_schema()).is_valid(values) == valid


def test_an_unknown_recipe_is_wrong_in_the_editor_already() -> None:
    validator = jsonschema.Draft202012Validator(config_schema())
    assert not validator.is_valid({**MINIMAL, "objective": {"recipe": "nothing"}})


def test_the_quickstart_and_a_resolved_config_are_valid() -> None:
    validator = jsonschema.Draft202012Validator(config_schema())
    values = {**yaml.safe_load(CONFIG.read_text()), "model": {"path": "m"}}
    validator.validate(values)
    validator.validate(json.loads(Config.model_validate(values).model_dump_json()))


def test_a_config_names_the_schema_relatively_inside_the_checkout_and_by_its_place_elsewhere(tmp_path: Path) -> None:
    assert schema_reference(ROOT / "mine.yaml") == "docs/config.schema.json"
    assert schema_reference(ROOT / "examples" / "mine.yaml") == "../docs/config.schema.json"
    assert schema_reference(tmp_path / "mine.yaml") == str(ROOT / "docs/config.schema.json")


def test_a_wheel_carries_the_schema_where_the_code_looks_for_it() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["force-include"]["docs/config.schema.json"] == "deploy/config.schema.json"
