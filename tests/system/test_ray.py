"""Whole runs with real Ray processes, a real model and the real decode loop."""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch

from deploy.export import export
from deploy.progress import Silent
from deploy.run import resume_training, run_training
from deploy.run_dir import RunDir
from deploy.start import start_ray
from distrl.config import Config, make_config
from distrl.errors import RunError
from distrl.manifest import describe
from distrl.models import TinyArchitecture, load_model, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from distrl.weights import policy_tensors

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    size = TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64)
    make_tiny_model(directory, character_tokenizer(ALPHABET), seed=0, architecture=size)
    return directory


def config(model: Path, directory: Path, name: str, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": directory, "name": name},
        "model": {"path": model},
        "data": {"source": "sort_digits", "heldout_size": 32, "options": {"digits": 4}},
        "rollout": {"group_size": 4, "max_new_tokens": 6},
        "generation": {"actors": 2, "slots": 16},
        "grading": {"actors": 2},
        "train": {"steps": 6, "tickets_per_step": 6, "learning_rate": 1e-3, "checkpoint_every_steps": 4},
        "evaluation": {"problems": 32, "every_steps": 3, "problems_during": 16},
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    return make_config(values, overrides)


def query(run: Path, sql: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(run / "ledger.sqlite") as db:
        return db.execute(sql).fetchall()


@pytest.fixture(scope="module")
def finished(running_ray: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An asynchronous run with two generation actors and reference scoring."""
    settings = config(
        model,
        tmp_path_factory.mktemp("runs"),
        "asynchronous",
        **{"train.max_staleness": 2, "objective.options": {"kl_coefficient": 0.01}},
    )
    summary = run_training(settings)
    assert summary == json.loads((settings.run_dir / "summary.json").read_text())
    return settings.run_dir


def test_every_ticket_is_trained_once_and_committed_with_a_checkpoint(finished: Path) -> None:
    assert query(finished, "SELECT state, COUNT(*) FROM tickets GROUP BY state") == [("committed", 36)]
    assert query(finished, "SELECT trained_step, COUNT(*) FROM tickets GROUP BY trained_step") == [
        (step, 6) for step in range(1, 7)
    ]
    named = {Path(path).name for (path,) in query(finished, "SELECT path FROM checkpoints")}
    assert named == {p.name for p in (finished / "checkpoints").iterdir()} == {"step-000004-v4", "step-000006-v6"}


def test_staleness_stays_within_the_bound_and_weights_were_really_pulled(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert 0 <= summary["max_observed_staleness"] <= 2
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    loaded = {(r["actor"], r["version"]) for r in records if r["kind"] == "load"}
    assert {("generation-0", 6), ("generation-1", 6)} <= loaded
    ((newest,),) = query(finished, "SELECT MAX(newest_version) FROM tickets")
    assert newest >= 3


def test_the_journal_holds_every_trained_rollout_with_all_columns(finished: Path) -> None:
    batches = []
    for path, rows in query(finished, "SELECT path, rows FROM journal_files"):
        table = pa.ipc.open_file(path).read_all()
        assert table.num_rows == rows
        batches.append(table)
    rollouts = pa.concat_tables(batches)
    assert rollouts.num_rows == len(set(rollouts["rollout_id"].to_pylist())) == 36 * 4
    assert rollouts["ref_logps"].null_count == 0
    # Nothing has been trained when the first batch is sampled: policy and reference are the same model.
    first = rollouts.filter(pa.compute.equal(rollouts["ticket_id"], 0)).to_pylist()
    for row in first:
        if set(row["policy_versions"]) == {0}:
            assert row["ref_logps"] == pytest.approx(row["behavior_logps"], abs=1e-5)


def test_the_first_step_is_on_policy_by_its_importance_ratios(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    first = next(r for r in records if r["kind"] == "step")
    # Engine and learner compute the same log-probabilities: every ratio is 1, and the sample is worth itself.
    assert first["metrics"]["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert first["metrics"]["ess"] == pytest.approx(1.0, abs=1e-4)


def test_an_export_holds_the_weights_of_the_last_published_version(finished: Path, tmp_path: Path) -> None:
    export(finished, "last", tmp_path / "exported")
    model = load_model(tmp_path / "exported", torch.float32)
    manifest = describe(policy_tensors(model), version=6, step=6)
    # The hash over all tensors that generation verified before it loaded them: equal weights, equal log-probabilities.
    assert query(finished, "SELECT manifest_sha256 FROM versions ORDER BY version DESC LIMIT 1") == [(manifest.sha256,)]


def test_the_last_checkpoint_is_a_model_directory_that_transformers_loads(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = finished / "checkpoints" / "step-000006-v6"
    assert AutoModelForCausalLM.from_pretrained(directory, local_files_only=True) is not None
    assert AutoTokenizer.from_pretrained(directory, local_files_only=True).eos_token_id is not None


def test_a_synchronous_run_that_is_stopped_and_resumed_ends_with_the_weights_of_one_that_was_not(
    running_ray: None, model: Path, tmp_path: Path
) -> None:
    """Two runs of one seed, two generation actors: the same to the last bit, though one of them is cut in two."""
    changes = {"train.max_staleness": 0, "train.steps": 5, "evaluation.every_steps": 0}
    whole = config(model, tmp_path, "whole", **changes)
    summaries = [run_training(whole)]
    parts = config(model, tmp_path, "parts", **changes)
    stopped = run_training(parts, StopAfter(parts.run_dir, step=2))
    assert stopped["state"] == "stopped"
    assert 2 <= stopped["steps"] < 5
    summaries.append(resume_training(parts.run_dir))

    last = [next((c.run_dir / "checkpoints").glob("step-000005-v*")) for c in (whole, parts)]
    weights = [(directory / "model.safetensors").read_bytes() for directory in last]
    assert weights[0] == weights[1]
    for key in ("state", "steps", "rollouts", "heldout_accuracy_before", "heldout_accuracy_after", "tickets"):
        assert summaries[0][key] == summaries[1][key], key
    assert query(parts.run_dir, "SELECT state, COUNT(*), MAX(staleness) FROM tickets GROUP BY state") == [
        ("committed", 30, 0)
    ]


class StopAfter(Silent):
    """Asks a run to stop when it sees a step; what `distrl stop` does."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self._stop = RunDir(run_dir).stop_request
        self._step = step

    def update(self, snapshot: dict[str, Any]) -> None:
        if snapshot["step"] >= self._step:
            self._stop.touch()


@pytest.mark.parametrize("train", [{"parallel": "fsdp", "activation_checkpointing": True, "layout": "packed"}])
def test_two_learner_workers_with_shards_train_with_a_value_head(
    running_ray: None, model: Path, tmp_path: Path, train: dict[str, Any]
) -> None:
    more = {f"train.{key}": value for key, value in train.items()} | {
        "objective.recipe": "ppo",
        "train.workers": 2,
        "train.steps": 3,
        "train.checkpoint_every_steps": 2,
        "train.lr_schedule": "cosine",
        "evaluation.every_steps": 0,
    }
    settings = config(model, tmp_path, "sharded", **more)
    summary = run_training(settings)
    assert summary["state"] == "finished"
    run = settings.run_dir
    assert query(run, "SELECT state, COUNT(*) FROM tickets GROUP BY state") == [("committed", 18)]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r["metrics"] for r in records if r["kind"] == "step"]
    assert steps[0]["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert all("loss_value" in step for step in steps)
    rates = [step["learning_rate"] for step in steps]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0
    exported = export(run, "last", tmp_path / "exported")
    assert exported["step"] == 3
    tensors = policy_tensors(load_model(tmp_path / "exported", torch.float32))
    manifest = describe(tensors, version=3, step=3)
    assert query(run, "SELECT manifest_sha256 FROM versions ORDER BY version DESC LIMIT 1") == [(manifest.sha256,)]


def test_a_learner_that_cannot_load_the_model_ends_the_run_with_its_cause(
    running_ray: None, model: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    settings = config(damaged, tmp_path, "broken", **{"generation.actors": 1})
    (damaged / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(RunError) as error:
        run_training(settings)
    assert str(error.value) == (
        f"generation-0 could not start: distrl.errors.DataError: model.path must be a causal language model that "
        f"transformers can load, got {str(damaged)!r}: SafetensorError: Error while deserializing header: "
        "header too large"
    )
