"""Recipes that sample from other weights than the policy's, on vLLM: values of a reference, opponents of an anchor."""

import math
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from deploy.audit import audit_run
from deploy.progress import Silent
from distrl.config import Config, make_config
from distrl.models import TinyArchitecture, load_model, load_tokenizer, make_tiny_model, save_model
from distrl.tasks import load_task
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from distrl.values_table import read_table
from tests.engines.tiny import full_logps

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs these tests")

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEMPERATURE = 1.0


def starts_low(response: str, answer: str, metadata: Mapping[str, object]) -> float:
    """1 for a response that begins with a small digit."""
    return float(response[:1] in tuple("01234"))


def longer(first: str, second: str, answer: str, metadata: Mapping[str, object]) -> float:
    """The longer response wins, the more surely the longer it is."""
    return 1.0 / (1.0 + math.exp((len(second) - len(first)) / 4))


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    import ray

    from deploy.start import start_ray

    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"), seed=0, sharpness=5.0)


def random_model(directory: Path, seed: int, sharpness: float) -> Path:
    """Random weights whose distributions are far from uniform, and from those of another seed."""
    size = TinyArchitecture(hidden_size=64, layers=2, heads=2, intermediate_size=64, context_length=64)
    make_tiny_model(directory, character_tokenizer(ALPHABET), seed=seed, architecture=size)
    made: Any = load_model(directory, torch.float32)
    with torch.no_grad():
        made.model.norm.weight.mul_(sharpness)
    save_model(directory, made, load_tokenizer(directory))
    return directory


def config(model: Path, directory: Path, name: str, **sections: Mapping[str, Any]) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": directory, "name": name},
        "model": {"path": model},
        "data": {"source": "sort_digits", "heldout_size": 8, "train_size": 40, "options": {"digits": 4}},
        "rollout": {"group_size": 4, "max_new_tokens": 12, "temperature": TEMPERATURE},
        "generation": {"engine": "vllm", "slots": 32, "engine_args": {"kv_cache_memory_bytes": 32 << 20}},
        "reward": {"grader": f"{__name__}:starts_low"},
        "train": {
            "steps": 4,
            "tickets_per_step": 4,
            "max_staleness": 1,
            "learning_rate": 1e-2,
            "checkpoint_every_steps": 1,
            "keep_checkpoints": 4,
            "logp_mismatch_bound": 1e-3,
        },
        "evaluation": {"problems": 4, "every_steps": 0},
        "limits": {"start_timeout_s": 400.0},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return make_config(values)


def journalled(run: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(run / "ledger.sqlite") as db:
        paths = [path for (path,) in db.execute("SELECT path FROM journal_files")]
    return [row for path in paths for row in pa.ipc.open_file(path).read_all().to_pylist()]


def low_share(model: "PreTrainedModel", prompt: list[int], low: list[int], padding: int, left: int) -> float:
    """P(`starts_low`) of a model's response, exact; padding is no text, and the next token is looked at."""
    first = full_logps(model, prompt, [0]).exp()[0]
    share = float(first[low].sum())
    if left > 1 and first[padding] > 1e-6:
        share += float(first[padding]) * low_share(model, [*prompt, padding], low, padding, left - 1)
    return share


def test_values_are_those_of_the_reference_model_and_train_a_policy(
    running_ray: None, model: Path, tmp_path: Path
) -> None:
    from deploy.run import run_training
    from deploy.vstar import make_table

    reference = random_model(tmp_path / "reference", seed=1, sharpness=3.0)
    settings = config(
        model,
        tmp_path,
        "a-star-po",
        reference={"path": reference},
        rollout={"group_size": 1},
        vstar={"path": tmp_path / "values.parquet", "responses": 16, "beta": 0.5},
        objective={"recipe": "a_star_po", "options": {"importance": "sequence"}},
        train={"tickets_per_step": 8},
    )
    made = make_table(settings, lambda done, of: None)
    table = read_table(tmp_path / "values.parquet")
    assert made["sampled"] == made["prompts"] == len(table.rows)

    tokenizer: Any = load_tokenizer(model)
    low, padding = tokenizer.convert_tokens_to_ids(list("01234")), tokenizer.pad_token_id
    task = load_task(settings.data)
    prompts = {p.prompt_id: tokenizer.encode(p.prompt) for p in (task.train[i] for i in range(len(task.train)))}
    expected = {}
    for path in (reference, model):
        one = load_model(path, torch.float32)
        shares = [low_share(one, prompts[row.prompt_id], low, padding, 12) for row in table.rows]
        expected[path] = sum(shares) / len(shares)
    found = sum(sum(row.rewards) for row in table.rows) / (16 * len(table.rows))
    # Five standard errors of a mean of coin flips, at most.
    error = 5 * 0.5 / math.sqrt(16 * len(table.rows))
    assert abs(expected[reference] - expected[model]) > 2 * error
    assert found == pytest.approx(expected[reference], abs=error)
    for row, value in zip(table.rows, table.v_star, strict=True):
        of_row = sum(math.exp(reward / 0.5) for reward in row.rewards) / 16
        assert value == pytest.approx(0.5 * math.log(of_row))

    assert run_training(settings, Silent())["steps"] == 4
    rows = journalled(settings.run_dir)
    assert len({v for row in rows for v in row["policy_versions"]}) >= 2
    assert all(row["v_star"] == table.by_prompt()[row["prompt_id"]] for row in rows)
    frozen = load_model(reference, torch.float32)
    for row in rows:
        logps = full_logps(frozen, row["prompt_token_ids"], row["response_token_ids"])
        of_tokens = logps.gather(1, torch.tensor(row["response_token_ids"])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row["ref_logps"]).double(), of_tokens, rtol=0, atol=1e-3)
    assert audit_run(settings.run_dir).violations == ()


@pytest.mark.parametrize("opponent_actors", [0, 1], ids=["beside the policy", "in a pool of their own"])
def test_opponents_play_on_the_anchors_weights_and_the_policy_on_its_own(
    running_ray: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opponent_actors: int
) -> None:
    from deploy import processes
    from deploy.run import run_training
    from tests.recording import RecordingGenerationActor, recorded

    monkeypatch.setattr(processes, "GenerationActor", RecordingGenerationActor)
    target = {"target": "snapshot", "snapshot_every": 2} if opponent_actors else {"target": "ema", "ema_rate": 0.3}
    settings = config(
        model,
        tmp_path,
        "nash",
        generation={"opponent_actors": opponent_actors, "update_mode": "recompute"},
        objective={"recipe": "nash_mp", "options": {"beta": 0.01, "prox": 0.5, **target}},
        preference={"function": f"{__name__}:longer", "opponents": 2},
        train={"steps": 5, "keep_checkpoints": 5},
    )
    assert run_training(settings, Silent())["steps"] == 5

    check_players(settings, recorded(settings.run_dir), renewed_every=2 if opponent_actors else 1)
    rows = journalled(settings.run_dir)
    assert {row["role"] for row in rows} == {"policy"}
    assert all(0.0 <= row["preference"] <= 1.0 for row in rows)
    assert audit_run(settings.run_dir).violations == ()


def check_players(settings: Config, rows: list[dict[str, Any]], renewed_every: int) -> None:
    """Every token has the log-probability of the weights of its role in the version that it names."""
    with sqlite3.connect(settings.run_dir / "ledger.sqlite") as db:
        steps = dict(db.execute("SELECT version, step FROM versions")) | {0: 0}
    weights = {step: weights_after(settings, step) for step in set(steps.values())}
    model: Any = load_model(settings.model.path, torch.float32)
    seen: dict[str, set[int]] = {"policy": set(), "opponent": set()}
    apart = 0.0
    for row in rows:
        role, tokens = row["role"], row["response_token_ids"]
        if role not in seen:
            continue
        for version in set(row["policy_versions"]):
            step = steps[version]
            own, other = weights[step] if role == "policy" else weights[step][::-1]
            of_version = [i for i, named in enumerate(row["policy_versions"]) if named == version]
            given = torch.tensor(row["behavior_logps"], dtype=torch.float64)[of_version]
            expected, others = (
                logps(model, tensors, row["prompt_token_ids"], tokens)[of_version] for tensors in (own, other)
            )
            torch.testing.assert_close(given, expected, rtol=0, atol=1e-3)
            apart = max(apart, float((given - others).abs().max()))
            seen[role].add(step)
            assert role == "policy" or step % renewed_every == 0
    assert len(seen["policy"]) >= 3
    assert len(seen["opponent"]) >= 2
    assert apart > 0.05  # else the wrong weights would pass as well


def weights_after(settings: Config, step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The policy's parameters after a step, and those of its opponents, from the checkpoint of that step."""
    if step == 0:
        start = dict(load_model(settings.model.path, torch.float32).named_parameters())
        return start, start
    (directory,) = (settings.run_dir / "checkpoints").glob(f"step-{step:06d}-*")
    dcp_to_torch_save(directory / "training", whole := settings.run_dir / "whole.pt")
    kept = torch.load(whole)
    policy = dict(load_model(directory, torch.float32).named_parameters())
    opponent = {name.removeprefix("model."): tensor for name, tensor in kept["anchors"]["opponent"].items()}
    assert policy.keys() <= opponent.keys(), sorted(opponent)
    return policy, {name: opponent[name] for name in policy}


def logps(model: Any, tensors: Mapping[str, torch.Tensor], prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probability of each token under some weights, by a plain forward pass."""
    model.load_state_dict(tensors, strict=False)
    return full_logps(model, prompt, tokens).gather(1, torch.tensor(tokens)[:, None])[:, 0]
