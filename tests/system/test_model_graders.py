"""Whole runs with real processes that models grade: episodes whose environment dies, and opponents before a judge."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from deploy.run import run_training
from distrl.config import make_config
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.graders.endpoint_server import says, server

pytestmark = pytest.mark.ray


def reward_model(directory: Path) -> str:
    tokenizer = character_tokenizer(ALPHABET)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, num_labels=1, pad_token_id=0, **sizes
    )
    Qwen3ForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_a_run_of_episodes_outlives_the_death_of_an_environment_actor(tmp_path: Path) -> None:
    size = TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64)
    make_tiny_model(tmp_path / "model", character_tokenizer(ALPHABET), seed=0, architecture=size)
    judged = {"path": reward_model(tmp_path / "rm")}
    run = make_config(
        {
            "run": {"dir": tmp_path / "runs", "name": "episodes"},
            "model": {"path": tmp_path / "model"},
            "data": {"source": "sort_digits", "heldout_size": 8, "options": {"digits": 4}},
            "environment": {
                "name": "tests.system.fragile_environment:Fragile",
                "options": {"marker": str(tmp_path / "died")},
            },
            "reward": {
                "graders": {
                    "episode": {},
                    "score": {"grader": "reward_model", "weight": 0.1, "options": judged},
                    "preference": {"grader": "preference_model", "weight": 0.5, "options": judged},
                }
            },
            "rollout": {"group_size": 4, "max_new_tokens": 48},
            "train": {"steps": 3, "tickets_per_step": 4, "checkpoint_every_steps": 3},
            "objective": {"recipe": "topr"},
            "evaluation": {"problems": 8, "every_steps": 0},
            "limits": {"call_attempts": 6},
        }
    )
    summary = run_training(run)
    assert (tmp_path / "died").exists()
    assert summary["state"] == "finished"
    assert summary["steps"] == 3
    directory = run.run_dir
    with sqlite3.connect(directory / "ledger.sqlite") as ledger:
        states = dict(ledger.execute("select state, count(*) from tickets group by state").fetchall())
        reasons = {row[0] for row in ledger.execute("select drop_reason from tickets where state = 'dropped'")}
    assert states["committed"] == 12
    assert reasons <= {"run_ended"}
    events = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert any(e["kind"] == "failed_call" and "environment-0" in e["message"] for e in events)

    turns = 0
    for file in sorted((directory / "journal").glob("*.arrow")):
        for row in pa.ipc.open_file(file).read_all().to_pylist():
            components = dict(row["components"])
            assert components["episode"] == sum(row["turn_rewards"])
            expected = components["episode"] + 0.1 * components["score"] + 0.5 * components["preference"]
            assert row["reward"] == pytest.approx(expected)
            assert row["grader"].startswith("1 episode + 0.1 score + 0.5 preference score@")
            assert len(row["loss_mask"]) == len(row["response_token_ids"])
            # After every message but the last comes the environment's digit.
            ends = row["turn_ends"]
            between = [i for i, sampled in enumerate(row["loss_mask"]) if not sampled]
            assert between == ends[:-1]
            turns = max(turns, len(ends))
    assert turns == 2


def says_the_longer(request: dict[str, Any]) -> tuple[int, Any]:
    """Names the longer response; of equally long ones whichever is first, which is what disagreement shows."""
    text = request["messages"][0]["content"]
    first = text.split("Response A:\n")[1].split("\n\nResponse B:")[0]
    second = text.split("Response B:\n")[1].split("\n\nEnd with")[0]
    return says(f"[[{'B' if len(second) > len(first) else 'A'}]]")


def test_nash_learning_with_a_judge_behind_an_endpoint_beside_a_reward_model(tmp_path: Path) -> None:
    size = TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64)
    make_tiny_model(tmp_path / "model", character_tokenizer(ALPHABET), seed=0, architecture=size)
    with server(says_the_longer) as (url, asked):
        run = make_config(
            {
                "run": {"dir": tmp_path / "runs", "name": "nash"},
                "model": {"path": tmp_path / "model"},
                "data": {"source": "sort_digits", "heldout_size": 8, "options": {"digits": 4}},
                "reward": {
                    "graders": {"score": {"grader": "reward_model", "options": {"path": reward_model(tmp_path / "rm")}}}
                },
                "preference": {"function": "judge", "options": {"url": url, "model": "judge"}, "opponents": 2},
                "rollout": {"group_size": 4, "max_new_tokens": 12},
                "train": {"steps": 3, "tickets_per_step": 4, "checkpoint_every_steps": 3},
                "objective": {"recipe": "nash_mp"},
                "evaluation": {"problems": 8, "every_steps": 0},
            }
        )
        summary = run_training(run)
    assert (summary["state"], summary["steps"]) == ("finished", 3)
    rows = [
        row
        for file in sorted((run.run_dir / "journal").glob("*.arrow"))
        for row in pa.ipc.open_file(file).read_all().to_pylist()
        if row["role"] == "policy"
    ]
    assert len(rows) >= 3 * 4 * 4
    for row in rows:
        # Each response met two opponents, and each pair was asked for in both orders: fourths.
        assert row["preference"] in (0.0, 0.25, 0.5, 0.75, 1.0)
        assert dict(row["components"])["disagreement"] in (0.0, 0.5, 1.0)
        assert row["grader"].startswith("reward_model ")
    assert {row["preference"] for row in rows} > {0.5}
    # Equal texts are not asked about: at most twice for each of two opponents.
    assert 0 < len(asked) <= 4 * len(rows)
