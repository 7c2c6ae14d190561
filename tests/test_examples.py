"""Every example is a config that would run, with a model in place of the one that a user fills in."""

import runpy
import string
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.check import check_run
from deploy.explain import explain
from deploy.quickstart import CONFIG
from distrl.config import load_config
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks import load_task
from distrl.tokenizer import character_tokenizer
from tests.recorded import record_run

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    size = TinyArchitecture(hidden_size=16, layers=1, heads=2, intermediate_size=16, context_length=2048)
    make_tiny_model(directory, character_tokenizer(string.printable), seed=0, architecture=size)
    return directory


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_would_run(path: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overrides = [f"model.path={model}"]
    if "replay:" in path.read_text():
        recorded = load_config(ROOT / "examples/sort_digits.yaml", [*overrides, f"run.dir={tmp_path}"])
        overrides += [f"replay.journal={record_run(recorded, 64)}", "train.steps=4"]
    config = load_config(path, overrides)
    if config.data.path is not None and not Path(config.data.path).exists():
        pytest.skip(f"{config.data.path} is not there; the example says where it comes from")
    plan = check_run(config)
    assert config.run.name == path.stem
    assert plan.heldout_problems >= max(config.evaluation.problems, config.evaluation.problems_during)
    assert len(explain(config, plan)) >= 9


def test_the_example_of_sorting_digits_is_the_quickstart_s_config() -> None:
    def settings(path: Path) -> dict[str, Any]:
        values: dict[str, Any] = yaml.safe_load(path.read_text())
        return {name: section for name, section in values.items() if name not in ("run", "model")}

    assert settings(ROOT / "examples/sort_digits.yaml") == settings(CONFIG)


def test_the_sums_are_those_that_the_script_writes_and_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(ROOT / "examples/data/write_addition.py"))
    assert script["FILE"].read_text() == script["lines"]()
    monkeypatch.chdir(ROOT)
    task = load_task(load_config(ROOT / "examples/jsonl.yaml").data)
    problems = [*(task.train[i] for i in range(len(task.train))), *task.heldout]
    assert len({p.prompt for p in problems}) == len(problems) == 50
    for problem in problems:
        words = problem.prompt.removesuffix("? The answer is").split()
        assert int(words[2]) + int(words[4]) == int(problem.answer)
