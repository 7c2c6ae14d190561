"""A whole run through vLLM: real Ray processes, real engine, real updates while it samples."""

import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from deploy.progress import Silent
from distrl.config import Config, make_config
from distrl.errors import ConfigError
from distrl.models import TinyArchitecture, load_model, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.engines.tiny import full_logps

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs these tests")

STEPS = 8


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    import ray

    from deploy.start import start_ray

    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    size = TinyArchitecture(hidden_size=64, layers=2, heads=2, intermediate_size=64)
    make_tiny_model(directory, character_tokenizer(ALPHABET), seed=0, architecture=size)
    return directory


def config(model: Path, directory: Path, name: str, *overrides: str) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": directory, "name": name},
        "model": {"path": model},
        "data": {"source": "sort_digits", "heldout_size": 8, "options": {"digits": 4}},
        "rollout": {"group_size": 4, "max_new_tokens": 64},
        "generation": {"engine": "vllm", "slots": 32, "engine_args": {"kv_cache_memory_bytes": 64 << 20}},
        "train": {
            "steps": STEPS,
            "tickets_per_step": 4,
            "max_staleness": 1,
            "learning_rate": 1e-3,
            "checkpoint_every_steps": 1,
            "keep_checkpoints": STEPS,
            "logp_mismatch_bound": 1e-3,
        },
        "evaluation": {"problems": 8, "every_steps": 0},
        "limits": {"start_timeout_s": 400.0},
    }
    return make_config(values, overrides)


@pytest.fixture(scope="module")
def finished(running_ray: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from deploy.run import run_training

    settings = config(model, tmp_path_factory.mktemp("runs"), "through-vllm")
    assert run_training(settings, Silent())["steps"] == STEPS
    return settings.run_dir


def rollouts(run: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(run / "ledger.sqlite") as db:
        paths = [path for (path,) in db.execute("SELECT path FROM journal_files")]
    return [row for path in paths for row in pa.ipc.open_file(path).read_all().to_pylist()]


def test_a_run_trains_over_versions_that_sequences_span(finished: Path) -> None:
    versions = [row["policy_versions"] for row in rollouts(finished)]
    assert len({v for row in versions for v in row}) >= 5
    assert any(len(set(row)) >= 2 for row in versions)
    assert all(row == sorted(row) for row in versions)


def test_every_recorded_token_has_the_logp_of_the_checkpoint_that_its_version_was_made_with(
    finished: Path, model: Path
) -> None:
    with sqlite3.connect(finished / "ledger.sqlite") as db:
        published = dict(db.execute("SELECT version, step FROM versions"))
    compared: set[int] = set()
    for version in range(STEPS + 1):
        step = published[version] if version else 0
        directory = finished / "checkpoints" / f"step-{step:06d}-v{version}" if version else model
        policy = load_model(directory, torch.float32)
        for row in rollouts(finished):
            tokens, named = row["response_token_ids"], row["policy_versions"]
            if version != named[0]:
                continue  # after an update the kept cache is of an older version
            first = named.count(version)
            logps = full_logps(policy, row["prompt_token_ids"], tokens)
            expected = logps.gather(1, torch.tensor(tokens)[:, None])[:first, 0]
            recorded = torch.tensor(row["behavior_logps"][:first], dtype=torch.float64)
            torch.testing.assert_close(recorded, expected, rtol=0, atol=1e-3)
            compared.add(version)
    assert len(compared) >= 5


def test_the_learner_reports_how_far_recorded_logps_are_from_its_own(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [r["metrics"] for r in records if r["kind"] == "step"]
    assert len(steps) == STEPS
    checked = [m for m in steps if "logp_mismatch_max.generation-0" in m]
    assert len(checked) >= 2
    assert all(m["logp_mismatch_max"] < 1e-3 for m in checked)
    loads = [r for r in records if r["kind"] == "load"]
    assert any(r["sequences_in_flight"] > 0 for r in loads)
    assert all(r["pause_s"] > 0 for r in loads)


def test_no_process_of_vllm_outlives_its_generation_actor(finished: Path) -> None:
    """The run ended by killing its actors; vLLM's processes notice within seconds."""
    import psutil

    from actors.engines.vllm_plugin import OWNER

    def orphans() -> list[int]:
        found = []
        for process in psutil.process_iter():
            try:
                owner = process.environ().get(OWNER)
            except psutil.Error:
                continue
            if owner is not None and not psutil.pid_exists(int(owner)):
                found.append(process.pid)
        return found

    deadline = time.monotonic() + 30
    while orphans() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert orphans() == []


def test_an_engine_argument_that_vllm_does_not_know_ends_the_run_before_it_starts(
    running_ray: None, model: Path, tmp_path: Path
) -> None:
    from deploy.run import run_training

    settings = config(model, tmp_path, "wrong", "generation.engine_args={max_modellen: 64}")
    with pytest.raises(ConfigError) as caught:
        run_training(settings, Silent())
    assert str(caught.value) == (
        "generation.engine_args.max_modellen must be an engine argument of vLLM, got 64; did you mean max_model_len?"
    )
    assert not settings.run_dir.exists()


def test_an_engine_argument_that_distrl_decides_is_refused(model: Path, tmp_path: Path) -> None:
    from deploy.check import check_run

    with pytest.raises(ConfigError) as caught:
        check_run(config(model, tmp_path, "wrong", "generation.engine_args={max_num_seqs: 4}"))
    assert str(caught.value) == (
        "generation.engine_args.max_num_seqs must not be given, because distrl decides it, got 4; "
        "set generation.slots instead"
    )
