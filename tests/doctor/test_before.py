"""The doctor finds what a config lacks on this machine, before anything is started."""

import socket
from pathlib import Path
from typing import Any

import pytest

from deploy.doctor import before
from deploy.doctor.before import Finding, examine, parameters
from distrl.config import Config, make_config
from distrl.models import TinyArchitecture, load_model, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.deploy.commands import call


@pytest.fixture(scope="module", name="model")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    size = TinyArchitecture(hidden_size=32, layers=1, heads=2, intermediate_size=64)
    make_tiny_model(directory, character_tokenizer(ALPHABET), seed=0, architecture=size)
    return directory


def config(model: Path, folder: Path, **sections: Any) -> Config:
    values = {"run": {"dir": str(folder)}, "model": {"path": str(model)}, "evaluation": {"problems": 8}}
    return make_config({**values, "data": {"source": "sort_digits", "heldout_size": 8}, **sections})


def found(made: Config, check: str) -> Finding:
    (one,) = [f for f in examine(made) if f.check == check]
    return one


def test_a_config_that_can_run_has_nothing_bad(model: Path, tmp_path: Path) -> None:
    findings = examine(config(model, tmp_path))
    assert [f.check for f in findings if f.verdict == "bad"] == []
    assert {f.check for f in findings} == {
        *("config", "tokenizer", "versions", "processors", "gpus", "memory", "disk", "storage", "port", "grader")
    }


def test_the_grader_is_tried_on_a_real_prompt(model: Path, tmp_path: Path) -> None:
    text = found(config(model, tmp_path), "grader").text
    assert "reward 1 for its own answer, 0 for nothing" in text


def test_parameters_are_counted_from_the_headers(model: Path) -> None:
    import torch

    loaded = load_model(model, torch.float32)
    names = {id(p) for p in loaded.parameters()}
    assert parameters(model) == sum(p.numel() for p in loaded.parameters() if id(p) in names)


def test_gpus_that_are_not_there_are_named_with_the_shortfall(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(before, "gpus_wanted", lambda config, plan: 5)
    monkeypatch.setattr(before, "_gpus_here", lambda: 2)
    assert found(config(model, tmp_path), "gpus") == Finding(
        "gpus",
        "bad",
        "the run needs 5 GPUs at once, this machine has 2: 3 too few, and it would wait for them for ever; lower "
        "train.workers or generation.actors, or run it on a cluster",
    )


def test_memory_that_is_not_there_is_named_by_role(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(before, "parameters", lambda path: 1 << 30)
    monkeypatch.setattr(before, "_memory_here", lambda: 10 << 30)
    one = found(config(model, tmp_path, objective={"options": {"kl_coefficient": 0.1}}), "memory")
    assert one.verdict == "bad"
    # 16 bytes per parameter to train, 4 to sample, 4 to score, and 1 GiB of rollouts; 2**30 parameters.
    assert "learners 16.00, generation 4.00, reference 4.00, rollouts 1.00 GiB" in one.text
    assert "together 25.00 GiB of 10.00 that are free: 15.00 too few" in one.text


def test_a_taken_port_and_a_missing_model_are_both_told(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        findings = examine(config(tmp_path / "none", tmp_path, metrics={"port": other.getsockname()[1]}))
    bad = {f.check for f in findings if f.verdict == "bad"}
    assert {"config", "port", "tokenizer", "memory"} <= bad
    assert "grader" not in bad


def test_the_command_fails_where_something_is_bad(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"run: {{dir: {tmp_path}}}\nmodel: {{path: {model}}}\ndata: {{source: sort_digits, heldout_size: 8}}\n"
    )
    assert call(monkeypatch, "doctor", str(file), "evaluation.problems=8") == 0
    assert "ok       grader" in capsys.readouterr().out
    assert call(monkeypatch, "doctor", str(file), "evaluation.problems=9") == 2
    assert (
        "bad      config     evaluation.problems must be <= the held-out problems (8), got 9" in capsys.readouterr().out
    )
    assert call(monkeypatch, "doctor") == 2
    assert capsys.readouterr().err == (
        "RefusedError: distrl doctor takes either CONFIG or --run RUN; name one of them\n"
    )
