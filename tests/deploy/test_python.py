"""`from deploy import train`: what the command line does, from Python."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import deploy
from deploy.progress import Progress, Silent, Terminal
from distrl.config import Config, load_config, make_config
from distrl.errors import ConfigError
from tests.builders import refusal
from tests.deploy.commands import call

ROOT = Path(__file__).parents[2]
VALUES: dict[str, Any] = {"model": {"path": "models/mine"}, "data": {"source": "sort_digits"}, "run": {"name": "mine"}}
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, Progress]]:
    """What was run, instead of running it; in a folder with the config mine.yaml."""
    started: list[tuple[Config, Progress]] = []

    def run(config: Config, progress: Progress) -> dict[str, Any]:
        started.append((config, progress))
        return {"heldout_accuracy_before": 0.25, "heldout_accuracy_after": 0.5}

    monkeypatch.setattr("deploy.run.run_training", run)
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(VALUES))
    return started


def test_path_text_mapping_and_config_are_the_same_run(runs: list[tuple[Config, Progress]]) -> None:
    expected = load_config(Path("mine.yaml"), ["train.steps=7"])
    for config in ("mine.yaml", Path("mine.yaml"), VALUES, make_config(VALUES)):
        assert deploy.train(config, ["train.steps=7"])["heldout_accuracy_after"] == 0.5
    assert [config for config, _ in runs] == [expected] * 4


def test_the_command_runs_the_same(runs: list[tuple[Config, Progress]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "train", "mine.yaml", "train.steps=7") == 0
    deploy.train("mine.yaml", ["train.steps=7"])
    assert runs[0][0] == runs[1][0]
    assert [type(progress) for _, progress in runs] == [Terminal, Terminal]


def test_quiet_shows_nothing(runs: list[tuple[Config, Progress]]) -> None:
    deploy.train(VALUES, quiet=True)
    assert isinstance(runs[0][1], Silent)


def test_a_wrong_config_is_refused_before_anything_starts(runs: list[tuple[Config, Progress]]) -> None:
    expected = "train.stepz is not a known key, got 20; did you mean train.steps?"
    assert refusal(ConfigError, lambda: deploy.train("mine.yaml", ["train.stepz=20"])) == expected
    assert runs == []


def test_the_examples_of_the_page_run(runs: list[tuple[Config, Progress]], capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), {})
        printed.append(capsys.readouterr().out)
    assert printed[0] == "0.250 -> 0.500\n"
    assert printed[2].strip() in BLOCKS[2], "the comment says what is printed"
    names = [config.run.name for config, _ in runs]
    assert names == ["short", "seed-0", "seed-1", "seed-2"]
    assert [config.run.seed for config, _ in runs] == [0, 0, 1, 2]


def test_importing_deploy_is_light_and_the_command_line_too() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)"
    code = f"import sys, deploy, deploy.cli; assert deploy.__all__ == ['train']; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
