"""`distrl vstar` on real processes: killed with SIGKILL and called again it gives the table of an undisturbed call."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from deploy.run import run_training
from distrl.config import load_config
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from distrl.values_table import read_table

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; sys.argv[0] = 'distrl'; from deploy.cli import main; main()"
DEADLINE_S = 120


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", COMMAND, "vstar", str(config), "--json", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        arguments, cwd=config.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(config: Path, *overrides: str) -> dict[str, object]:
    out, err = (process := start(config, *overrides)).communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    found: dict[str, object] = json.loads(out)
    return found


def test_a_killed_stage_1_goes_on_to_the_same_table_and_stage_2_trains_with_it(tmp_path: Path) -> None:
    size = TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64, context_length=16)
    make_tiny_model(tmp_path / "model", character_tokenizer(ALPHABET), seed=0, architecture=size)
    config = tmp_path / "run.yaml"
    values = {
        "run": {"dir": "runs", "name": "stage-2"},
        "model": {"path": "model"},
        "data": {"source": "sort_digits", "heldout_size": 8, "train_size": 600, "options": {"digits": 4}},
        "rollout": {"group_size": 1, "max_new_tokens": 6},
        "generation": {"actors": 2, "slots": 32},
        "objective": {"recipe": "a_star_po", "options": {"importance": "sequence"}},
        "vstar": {"path": "values.parquet", "responses": 4},
        "train": {"steps": 2, "tickets_per_step": 8},
        "evaluation": {"problems": 8, "every_steps": 0},
    }
    config.write_text(yaml.safe_dump(values))
    # Without a disturbance, and by one actor.
    whole = finish(config, "vstar.path=whole.parquet", "generation.actors=1")
    assert whole["sampled"] == whole["prompts"]

    killed = start(config)
    parts = tmp_path / "values.parquet.parts"
    deadline = time.monotonic() + DEADLINE_S
    while not list(parts.glob("*.jsonl")):
        assert time.monotonic() < deadline, "nothing was written"
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    kept = sum(len(path.read_text().splitlines()) for path in parts.glob("*.jsonl"))
    assert 0 < kept < 600

    resumed = finish(config)
    assert resumed["sampled"] == int(str(resumed["prompts"])) - kept
    assert (tmp_path / "values.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not parts.exists()

    again = finish(config, "vstar.mode=max", "vstar.path=whole.parquet")
    assert again["sampled"] == 0
    rows = read_table(tmp_path / "whole.parquet")
    assert rows.v_star == tuple(max(row.rewards) for row in rows.rows)

    check_stage_2(config)


def check_stage_2(config: Path) -> None:
    """The journal holds each prompt's value beside its rollout."""
    os.chdir(config.parent)
    settings = load_config(config)
    summary = run_training(settings)
    assert summary["steps"] == 2
    table = read_table(config.parent / "values.parquet").by_prompt()
    files = sorted((settings.run_dir / "journal").glob("*.arrow"))
    rows = pa.concat_tables([pa.ipc.open_file(path.read_bytes()).read_all() for path in files]).to_pylist()
    assert len(rows) >= 16
    assert all(row["v_star"] == table[row["prompt_id"]] for row in rows)
