"""Recipes of preferences in real runs: mixed opponents, opponents of a killed actor, pairs, and a killed run."""

import math
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch

from deploy import processes
from deploy.audit import audit_run
from deploy.progress import Silent
from deploy.run import run_training
from deploy.start import start_ray
from distrl.config import Config, make_config
from distrl.models import TinyArchitecture, load_model, load_tokenizer, make_tiny_model, save_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.engines.tiny import full_logps
from tests.recording import HELD_TICKET, HeldGenerationActor, RecordingGenerationActor, recorded, sampled
from tests.system.sigkill import compare

pytestmark = pytest.mark.ray

DEADLINE_S = 120.0
OPPONENTS = 2


def longer(first: str, second: str, answer: str, metadata: Mapping[str, object]) -> float:
    """The longer response wins, the more surely the longer it is."""
    return 1.0 / (1.0 + math.exp((len(second) - len(first)) / 4))


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"), seed=0)


def random_model(directory: Path, seed: int) -> Path:
    """Random weights whose distributions are far from uniform, and from those of another seed."""
    size = TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64, context_length=32)
    make_tiny_model(directory, character_tokenizer(ALPHABET), seed=seed, architecture=size)
    made: Any = load_model(directory, torch.float32)
    with torch.no_grad():
        made.model.norm.weight.mul_(4)
    save_model(directory, made, load_tokenizer(directory))
    return directory


def config(model: Path, directory: Path, name: str, recipe: str, **sections: Mapping[str, Any]) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": directory, "name": name},
        "model": {"path": model},
        "data": {"source": "sort_digits", "heldout_size": 8, "options": {"digits": 4}},
        "rollout": {"group_size": 4, "max_new_tokens": 8},
        "generation": {"actors": 2, "slots": 16},
        "objective": {"recipe": recipe},
        "preference": {"function": f"{__name__}:longer"},
        "train": {
            "steps": 4,
            "tickets_per_step": 4,
            "max_staleness": 1,
            "learning_rate": 1e-2,
            "checkpoint_every_steps": 1,
            "keep_checkpoints": 4,
        },
        "evaluation": {"problems": 4, "every_steps": 0},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return make_config(values)


def journalled(run: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(run / "ledger.sqlite") as db:
        paths = [path for (path,) in db.execute("SELECT path FROM journal_files")]
    return [row for path in paths for row in pa.ipc.open_file(path).read_all().to_pylist()]


def test_opponents_of_nash_md_are_mixed_of_the_newest_policy_and_the_reference(
    running_ray: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GenerationActor", RecordingGenerationActor)
    share, reference = 0.5, random_model(tmp_path / "reference", seed=1)
    settings = config(
        *(model, tmp_path, "nash-md", "nash_md"),
        reference={"path": reference},
        generation={"update_mode": "recompute"},
        objective={"recipe": "nash_md", "options": {"tau": 0.01, "mixture": share}},
    )
    assert run_training(settings, Silent())["steps"] == 4

    with sqlite3.connect(settings.run_dir / "ledger.sqlite") as db:
        steps = dict(db.execute("SELECT version, step FROM versions")) | {0: 0}
    frozen = load_model(reference, torch.float32)
    policies = {0: load_model(model, torch.float32)}
    for step in range(1, 5):
        (directory,) = (settings.run_dir / "checkpoints").glob(f"step-{step:06d}-*")
        policies[step] = load_model(directory, torch.float32)
    seen: dict[str, set[int]] = {"policy": set(), "opponent": set()}
    apart = 0.0
    for row in recorded(settings.run_dir):
        if row["role"] not in seen:
            continue
        tokens = row["response_token_ids"]
        for version in set(row["policy_versions"]):
            places = [i for i, named in enumerate(row["policy_versions"]) if named == version]
            given = torch.tensor(row["behavior_logps"], dtype=torch.float64)[places]
            ours, theirs = (
                full_logps(one, row["prompt_token_ids"], tokens) for one in (policies[steps[version]], frozen)
            )
            mixed = ((1 - share) * ours + share * theirs).log_softmax(-1)
            chosen = torch.tensor(tokens)[:, None]
            own, other = (logps.gather(1, chosen)[places, 0] for logps in (ours, mixed))
            if row["role"] == "opponent":
                own, other = other, own
            torch.testing.assert_close(given, own, rtol=0, atol=1e-4)
            apart = max(apart, float((given - other).abs().max()))
            seen[row["role"]].add(steps[version])
    assert apart > 0.1  # else the wrong distribution would pass as well
    assert len(seen["policy"]) >= 2
    assert len(seen["opponent"]) >= 2
    assert audit_run(settings.run_dir).violations == ()


def test_opponents_of_a_killed_actor_are_drawn_again_and_met(
    running_ray: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GenerationActor", HeldGenerationActor)
    settings = config(
        *(model, tmp_path, "nash-mp", "nash_mp"),
        preference={"function": f"{__name__}:longer", "opponents": OPPONENTS},
        objective={"recipe": "nash_mp", "options": {"ema_rate": 0.5}},
    )
    killed: list[int] = []

    def kill() -> None:
        held, deadline = sampled(settings.run_dir) / "held", time.monotonic() + DEADLINE_S
        while not held.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(pid := int(held.read_text()), signal.SIGKILL)
        killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert run_training(settings, Silent())["steps"] == 4
    finally:
        killer.join()

    rollouts: dict[str, dict[str, Any]] = {}
    for row in recorded(settings.run_dir):
        rollouts[row["rollout_id"]] = row  # one that was sampled twice is so with the same noise
    assert len(killed) == 1
    # It had not answered when it was killed; who has answered is another process.
    answered = [path.parent.name for path in sampled(settings.run_dir).glob(f"*/o{HELD_TICKET}.0.0.arrow")]
    assert answered
    assert not any(name.endswith(f"-{killed[0]}") for name in answered)
    rows = journalled(settings.run_dir)
    assert HELD_TICKET in {row["ticket_id"] for row in rows}
    for row in rows:
        assert row["role"] == "policy"
        met = [rollouts[f"o{row['ticket_id']}.0.{(row['group_index'] + i) % 4}"]["text"] for i in range(OPPONENTS)]
        expected = [0.5 if text == row["text"] else longer(row["text"], text, "", {}) for text in met]
        assert row["preference"] == pytest.approx(sum(expected) / OPPONENTS)
    found = audit_run(settings.run_dir)
    assert found.violations == ()
    assert "lost" in (settings.run_dir / "metrics.jsonl").read_text()


def test_online_ipo_compares_the_pairs_of_a_ticket(running_ray: None, model: Path, tmp_path: Path) -> None:
    settings = config(model, tmp_path, "ipo", "online_ipo", train={"max_staleness": 0, "steps": 2})
    assert run_training(settings, Silent())["steps"] == 2
    rows = {row["rollout_id"]: row for row in journalled(settings.run_dir)}
    assert len(rows) == 2 * 4 * 4
    for row in rows.values():
        other = rows[f"p{row['ticket_id']}.{row['redraw']}.{row['group_index'] ^ 1}"]["text"]
        assert row["preference"] == pytest.approx(0.5 if other == row["text"] else longer(row["text"], other, "", {}))
    assert audit_run(settings.run_dir).violations == ()


@pytest.mark.nodes
def test_a_run_of_nash_mp_that_is_killed_goes_on_with_its_anchors(tmp_path: Path) -> None:
    changes = {
        "objective": {"recipe": "nash_mp", "options": {"ema_rate": 0.3}},
        "preference": {"function": f"{__name__}:longer"},
    }
    found = compare(tmp_path, kills=1, seed=2, changes=changes)
    alone, killed = found.contents
    assert alone == killed
    assert any(name.startswith("training/anchors/opponent/") for name in alone)
    assert any(name.startswith("training/anchors/anchor/") for name in alone)
    assert found.violations == ()
