"""`distrl export`: the checkpoint that the ledger names, whole, clean and unchanged, or an error."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy import export as module
from deploy.export import export
from deploy.run_dir import RunDir
from distrl.errors import RefusedError, RunError
from distrl.ledger import Ledger
from distrl.models import TinyArchitecture, load_model, load_tokenizer, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from learners.checkpoint import CheckpointWriter, TrainState
from learners.optimizer import OptimizerSettings, make_optimizer
from learners.world import World
from tests.builders import refusal
from tests.deploy.commands import call

ACCURACY = {20: 0.5, 40: 0.75, 60: 0.625}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints whose weights differ."""
    folder: Path = tmp_path_factory.mktemp("runs")
    size = TinyArchitecture(hidden_size=16, layers=1, heads=2, intermediate_size=16)
    make_tiny_model(folder / "model", character_tokenizer(ALPHABET), seed=0, architecture=size)
    model, tokenizer = load_model(folder / "model", torch.float32), load_tokenizer(folder / "model")
    optimizer = make_optimizer(model, OptimizerSettings(1e-2, 0, 0.1, (0.9, 0.95), 1.0))
    run_dir = RunDir(folder / "mine")
    run_dir.checkpoints.mkdir(parents=True)
    run_dir.run_json.write_text('{"format": 1, "name": "mine"}')
    ledger = Ledger(run_dir.ledger)
    version = ledger.allocate_version(None, 0)
    for step in ACCURACY:
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        version = ledger.allocate_version(version, step)
        path = run_dir.checkpoints / f"step-{step:06d}"
        writer = CheckpointWriter(World(), tokenizer.save_pretrained)
        writer.begin(path, model, model, optimizer, TrainState(step, version))
        written = writer.finished(wait=True)
        assert written is not None
        ledger.commit_checkpoint(str(path), step=step, version=version, sha256=written.sha256)
    ledger.close()
    return run_dir.path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy, in another place than the ledger's paths say."""
    return Path(shutil.copytree(made, tmp_path / "moved" / "mine"))


def evaluate(run: Path, name: str, step: int, accuracy: float) -> None:
    ledger = Ledger(run / "ledger.sqlite")
    numbers = {"oldest_version": 0, "newest_version": 0, "problems": 8, "responses": 8, "failed": 0}
    more = {"accuracy": accuracy, "standard_error": 0.1, "reward_mean": accuracy}
    ledger.record_evaluation({"name": name, "step": step, **numbers, **more})
    ledger.close()


def logps(directory: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokenizer.encode("31415>113")])).logits
    return logits.log_softmax(-1)


def test_from_pretrained_loads_the_last_checkpoint_s_weights_without_the_optimizer(run: Path) -> None:
    export(run)
    target = run / "exports" / "step-000060"
    assert torch.equal(logps(target), logps(run / "checkpoints" / "step-000060"))
    assert not torch.equal(logps(target), logps(run / "checkpoints" / "step-000040"))
    names = {path.name for path in target.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "distrl.json"}
    assert names == {path.name for path in (run / "checkpoints" / "step-000060").iterdir()} - {
        "training",
        "state.json",
    } | {"distrl.json"}
    assert {path.name for path in target.parent.iterdir()} == {"step-000060"}


def test_distrl_json_says_what_it_is(run: Path, tmp_path: Path) -> None:
    evaluate(run, "during", 40, 0.75)
    made = export(run, "step-000040", tmp_path / "out")
    card = json.loads((tmp_path / "out" / "distrl.json").read_text())
    ledger = {c.name: c for c in module.checkpoints(RunDir(run))}
    assert card == {
        "format": 1,
        "run": "mine",
        "checkpoint": "step-000040",
        "step": 40,
        "version": 2,
        "sha256": ledger["step-000040"].sha256,
        "accuracy": 0.75,
    }
    assert made == {**card, "path": str(tmp_path / "out")}


def test_the_best_checkpoint_is_that_of_the_highest_accuracy_the_later_of_equals(run: Path, tmp_path: Path) -> None:
    evaluate(run, "before", 0, 0.9)
    for step, accuracy in ACCURACY.items():
        evaluate(run, "during", step, accuracy)
    evaluate(run, "during", 50, 1.0)  # of no checkpoint
    assert export(run, "best", tmp_path / "a")["checkpoint"] == "step-000040"
    evaluate(run, "after", 60, 0.75)
    assert export(run, "best", tmp_path / "b")["checkpoint"] == "step-000060"


def test_a_directory_that_the_ledger_does_not_name_does_not_exist(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step-000060", run / "checkpoints" / "step-000080")
    assert export(run)["checkpoint"] == "step-000060"
    assert refusal(RefusedError, lambda: export(run, "step-000080")) == (
        "--checkpoint must be last, best or one that the ledger names (step-000020, step-000040, step-000060), got "
        "'step-000080'"
    )


def test_a_run_is_not_touched(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    export(run, out=tmp_path / "out")
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before


def test_a_run_that_goes_on_can_be_exported(run: Path, tmp_path: Path) -> None:
    ledger = Ledger(run / "ledger.sqlite")
    first = {c.name: c for c in module.checkpoints(RunDir(run))}["step-000020"]
    shutil.copytree(run / "checkpoints" / "step-000020", run / "checkpoints" / "step-000080")
    # In the write-ahead log only, until the ledger is closed.
    ledger.commit_checkpoint("step-000080", step=80, version=3, sha256=first.sha256)
    assert export(run, out=tmp_path / "out")["checkpoint"] == "step-000080"
    ledger.commit_checkpoint("step-000100", step=100, version=3, sha256=first.sha256)
    ledger.close()


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    expected = (
        f"RUN: {tmp_path} must have a checkpoint, its ledger names none yet; wait for the first one "
        "(train.checkpoint_every_steps)"
    )
    assert refusal(RefusedError, lambda: export(tmp_path)) == expected
    Ledger(tmp_path / "ledger.sqlite").close()
    assert refusal(RefusedError, lambda: export(tmp_path)) == expected


def test_what_is_not_a_run_is_named_with_the_nearest_one(run: Path, tmp_path: Path) -> None:
    assert refusal(RefusedError, lambda: export(run.parent / "main")) == (
        f"RUN: {run.parent / 'main'} must be a run directory, it does not exist; did you mean {run}?"
    )
    assert refusal(RefusedError, lambda: export(run.parent)) == (
        f"RUN: {run.parent} must be a run directory, it has no run.json; did you mean {run}?"
    )
    (tmp_path / "file").write_text("")
    assert refusal(RefusedError, lambda: export(tmp_path / "file")) == (
        f"RUN: {tmp_path / 'file'} must be a run directory, it is a file; give the folder that `distrl train` made, "
        "such as runs/NAME"
    )


def test_best_needs_an_evaluation(run: Path) -> None:
    assert refusal(RefusedError, lambda: export(run, "best")) == (
        "--checkpoint best needs a held-out evaluation at the step of a checkpoint, got none; use last, or measure "
        "checkpoints with distrl eval"
    )


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_target_that_exists_is_left_as_it_is(run: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    target.mkdir() if kind == "directory" else target.write_text("precious")
    assert refusal(RefusedError, lambda: export(run, out=target)) == (
        f"--out: {target} must not exist yet, export never overwrites anything; choose another directory or delete it"
    )
    assert list(target.iterdir()) == [] if kind == "directory" else target.read_text() == "precious"


def test_a_checkpoint_that_was_changed_is_not_exported(run: Path, tmp_path: Path) -> None:
    source = run / "checkpoints" / "step-000060"
    digest = module.checkpoints(RunDir(run))[-1].sha256
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    changed = module.checkpoint_sha256(source)
    assert refusal(RunError, lambda: export(run, out=tmp_path / "out")) == (
        f"checkpoint {source} must have sha256 {digest}, got {changed}; its files were changed after it was written: "
        "restore it or export another one"
    )
    shutil.rmtree(source)
    assert refusal(RunError, lambda: export(run, out=tmp_path / "out")) == (
        f"checkpoint {source} is named by the ledger but missing; restore it or export another one"
    )
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    target = tmp_path / "models" / "out"
    assert refusal(RunError, lambda: export(run, out=target)) == (
        f"--out: {target} cannot be written: No space left on device; nothing is left of it: make room or choose "
        "another place"
    )
    assert list(target.parent.iterdir()) == []


def test_a_ledger_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "ledger.sqlite").write_text("not a database" * 100)
    assert refusal(RunError, lambda: export(tmp_path)) == (
        f"RUN: {tmp_path / 'ledger.sqlite'} must be a readable ledger: file is not a database; restore it"
    )


def test_the_command_says_where_it_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call(monkeypatch, "export", str(run), "--out", str(out)) == 0
    assert capsys.readouterr().out == f"wrote {out}: step-000060 of mine, policy version 3\n"
    assert call(monkeypatch, "export", str(run), "--out", str(out)) == 2
    assert call(monkeypatch, "export", str(run), "--out", f"{out}2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["path"] == f"{out}2"
