"""The command line as a user meets it: what it prints and how it exits."""

import sys
from pathlib import Path

import pytest
import yaml

from deploy.exit_codes import EXIT_REFUSED
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.deploy.commands import call


@pytest.fixture
def config(tmp_path: Path) -> Path:
    size = TinyArchitecture(hidden_size=32, layers=1, heads=2, intermediate_size=32)
    make_tiny_model(tmp_path / "model", character_tokenizer(ALPHABET), seed=0, architecture=size)
    values = {
        "run": {"dir": str(tmp_path / "runs"), "name": "mine"},
        "model": {"path": str(tmp_path / "model")},
        "data": {"source": "sort_digits", "heldout_size": 64},
        "evaluation": {"problems": 64},
        "train": {"steps": 7, "tickets_per_step": 4, "max_staleness": 3},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_validate_says_in_words_what_would_run(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = call(monkeypatch, "validate", str(config), "rollout.group_size=8", "generation.actors=2")
    assert status == 0
    lines = capsys.readouterr().out.splitlines()
    model = config.parent / "model"
    assert lines[0] == f"trains    {model} for 7 steps of 32 rollouts (4 prompts x 8)"
    assert lines[1] == "data      sort_digits: 100000 training and 64 held-out problems"
    assert lines[3] == "staleness at most 3 steps old; a step waits for a straggler"
    assert lines[4].startswith("samples   2 generation actor(s), engine transformers")
    assert lines[6] == "scores    no reference model: the objective does not read one"
    assert lines[9] == f"keeps     {config.parent / 'runs' / 'mine'}"
    assert not (config.parent / "runs").exists()


def test_validate_names_the_reference_when_the_objective_reads_it(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "validate", str(config), "objective.options={kl_coefficient: 0.1}") == 0
    model = config.parent / "model"
    assert f"scores    1 reference actor(s) score every rollout with {model}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.max_stalenes=2"],
            "ConfigError: train.max_stalenes is not a known key, got 2; did you mean train.max_staleness?",
        ),
        (
            ["objective.options={baseline: 0.0}"],
            "ConfigError: topr.baseline must be > the lowest reward 0.0, got 0.0; else no response is pushed down "
            "(supervised training on the others): use 0.5 for rewards in {0, 1}, or rewards in {-1, 1} with baseline 0",
        ),
        (
            ["evaluation.problems=65"],
            "ConfigError: evaluation.problems must be <= the held-out problems (64), got 65; lower it or raise "
            "data.heldout_size",
        ),
        (
            ["rollout.group_size=1", "objective.recipe=grpo"],
            "ConfigError: grpo needs a group size >= 2, got 1; a response alone in its group is its own mean and has "
            "credit 0: sample more responses per prompt",
        ),
        (
            ["model.path=/nowhere/model"],
            "DataError: model.path must be a local directory, got '/nowhere/model'; names of a model hub are not "
            "downloaded",
        ),
        (
            ["reference.path=/somewhere"],
            "ConfigError: reference.path must be empty for objective.recipe topr as configured, got '/somewhere'; "
            "nothing reads the reference model: remove it, or set objective.options.kl_coefficient",
        ),
        (
            ["generation.slots=8"],
            "ConfigError: generation.slots must be >= rollout.group_size (16), got 8; a ticket's responses are sampled "
            "together",
        ),
    ],
)
def test_a_run_that_would_not_do_what_it_says_is_refused_with_status_2(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    for command in ("validate", "train"):
        assert call(monkeypatch, command, str(config), *overrides) == EXIT_REFUSED
        assert capsys.readouterr().err == message + "\n"
    assert not (config.parent / "runs").exists()


def test_a_run_never_overwrites_another(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = config.parent / "runs" / "mine"
    taken.mkdir(parents=True)
    assert call(monkeypatch, "train", str(config)) == EXIT_REFUSED
    assert capsys.readouterr().err == (
        f"RefusedError: run.name: the directory {taken} must not exist yet, a run never overwrites another; choose a "
        "new name with run.name=... or delete it\n"
    )


def test_every_command_shows_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("quickstart", "train", "validate"):
        assert call(monkeypatch, command, "--help") == 0
        assert f"Example: distrl {command} " in capsys.readouterr().out


def test_a_grader_in_the_current_folder_is_found_and_shadows_no_installed_package(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "my_own_rewards.py").write_text("def grade(response, answer, metadata):\n    return 1.0\n")
    (config.parent / "numpy.py").write_text("raise ImportError('not the real one')\n")
    monkeypatch.chdir(config.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert call(monkeypatch, "validate", str(config), "reward.grader=my_own_rewards:grade") == 0
    assert "my_own_rewards:grade" in capsys.readouterr().out
    assert sys.path[-1] == str(config.parent)
