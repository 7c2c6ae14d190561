"""`distrl init`: a config that needs its paths only, whose comments are the models' own words."""

import re
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from deploy.config_schema import config_schema
from deploy.starter import FILL_IN, starter
from deploy.starter_tasks import TaskName
from distrl.config import Config, known_keys, load_config
from distrl.tasks import load_task
from distrl.tasks.config import Source
from tests.deploy.commands import call

TASKS = get_args(TaskName)
MISSING = {"sort_digits": ["model.path"], "jsonl": ["model.path", "data.path"], "reasoning_gym": ["model.path"]}


def sections() -> dict[str, type[BaseModel]]:
    found = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def entries(text: str) -> dict[str, str]:
    """The comment above each section and key, by dotted name."""
    found: dict[str, str] = {}
    section, comment = "", []
    for line in text.partition("\n\n")[2].splitlines():
        if line.lstrip().startswith("#"):
            comment.append(line.strip().removeprefix("# "))
        elif key := re.match(r"( *)(\w+):", line):
            section = section if key[1] else key[2]
            found[f"{section}.{key[2]}" if key[1] else key[2]] = " ".join(comment)
            comment = []
    assert comment == []
    return found


def description(name: str) -> str:
    """What the models say about a section or a key."""
    section, _, key = name.partition(".")
    kinds = sections()
    if key:
        return " ".join((kinds[section].model_fields[key].description or "").split())
    if section in kinds:
        return (kinds[section].__doc__ or "").partition("\n")[0]
    return Config.model_fields[section].description or ""


def write(monkeypatch: pytest.MonkeyPatch, path: Path, task: str) -> str:
    assert call(monkeypatch, "init", str(path), "--task", task) == 0
    return path.read_text()


@pytest.mark.parametrize("task", TASKS)
def test_the_file_loads_once_its_paths_are_filled_in(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write(monkeypatch, tmp_path / "mine.yaml", task)
    assert text.count(FILL_IN) == len(MISSING[task])
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{i}", "answer": ""}}\n' for i in range(2000)))
    filled = text.replace(FILL_IN, " prompts.jsonl")
    (tmp_path / "mine.yaml").write_text(filled)
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("mine.yaml"), ["model.path=models/mine"])
    assert config.run.name == "mine"
    assert config.data.source == task
    jsonschema.Draft202012Validator(config_schema()).validate(yaml.safe_load(filled))
    assert len(load_task(config.data).heldout) >= max(config.evaluation.problems, config.evaluation.problems_during)


@pytest.mark.parametrize("task", TASKS)
def test_every_comment_is_the_description_of_its_key_and_every_section_is_there(task: TaskName) -> None:
    found = entries(starter(Path("mine.yaml"), task))
    assert set(sections()) <= set(found)
    for name, comment in found.items():
        said, more, others = comment.partition(" More keys: ")
        assert said == description(name) != ""
        shown = {key.removeprefix(f"{name}.") for key in found if key.startswith(f"{name}.")}
        if more:
            assert shown.isdisjoint(others.removesuffix(".").split(", "))
            assert shown.union(others.removesuffix(".").split(", ")) == set(sections()[name].model_fields)
    assert set(found) <= set(known_keys())


def test_a_value_that_is_not_of_the_task_is_the_default() -> None:
    text = starter(Path("mine.yaml"), "jsonl").replace(FILL_IN, " x")
    written: dict[str, Any] = yaml.safe_load(text)
    for section in set(sections()) - {"data", "run", "evaluation", "model"}:
        for key, value in written[section].items():
            default = sections()[section].model_fields[key].default
            assert (list(default) if isinstance(default, tuple) else default) == value, (section, key)


def test_the_first_line_is_for_the_editor_and_names_a_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    header = starter(path, "jsonl").partition("\n")[0]
    prefix = "# yaml-language-server: $schema="
    assert header.startswith(prefix)
    assert (path.parent / header.removeprefix(prefix)).is_file()


@pytest.mark.parametrize(
    ("name", "run"), [("gsm8k_tiny.yaml", "gsm8k_tiny"), ("my first.yaml", "my-first"), (".yaml", "yaml"), ("_", "run")]
)
def test_the_run_is_named_after_the_file(name: str, run: str) -> None:
    text = starter(Path(name), "sort_digits")
    assert yaml.safe_load(text)["run"]["name"] == run


def test_a_file_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("precious")
    assert call(monkeypatch, "init", str(path)) == 2
    assert capsys.readouterr().err == (
        f"RefusedError: PATH: {path} must not exist yet, init never overwrites a file; choose another name or delete "
        "it\n"
    )
    assert path.read_text() == "precious"


def test_a_folder_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nowhere" / "mine.yaml"
    assert call(monkeypatch, "init", str(path)) == 2
    assert capsys.readouterr().err == (
        f"RefusedError: PATH: {path} cannot be written: No such file or directory; choose another place\n"
    )


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("sort_digits", "ConfigError: model.path must not be empty; fill it in or pass model.path=...\n"),
        (
            "jsonl",
            "ConfigError: model.path must not be empty; fill it in or pass model.path=...\n"
            "data.path must be set for data.source jsonl, got None; set data.path\n",
        ),
    ],
)
def test_what_was_not_filled_in_is_named(
    task: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "mine.yaml"
    write(monkeypatch, path, task)
    capsys.readouterr()
    assert call(monkeypatch, "validate", str(path)) == 2
    assert capsys.readouterr().err == message


def test_the_tasks_are_sources_of_data() -> None:
    assert set(TASKS) <= set(get_args(Source))
