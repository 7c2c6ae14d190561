"""Where the metrics go: the endpoint, Parquet, TensorBoard, Weights & Biases."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from actors.recorder import Recorder
from deploy.metrics.boards import check_wandb, tag
from deploy.metrics.endpoint import check_port
from deploy.metrics.history import FLUSH_ROWS, History
from deploy.metrics.run import RunMetrics
from deploy.run import run_training
from deploy.run_dir import RunDir, create_run_dir
from distrl.config import Config, make_config
from distrl.config_sections import MetricsConfig
from distrl.errors import ConfigError, RefusedError, RunError
from tests.builders import refusal
from tests.metrics.snapshots import record, snapshot


def config(folder: Path, **metrics: Any) -> Config:
    values = {"run": {"dir": str(folder), "name": "watched"}, "model": {"path": str(folder / "model")}}
    return make_config({**values, "data": {"source": "sort_digits"}, "metrics": metrics})


def watch(made: Config, run_dir: RunDir, steps: int = 2) -> str:
    """Metrics of some steps; what the endpoint said after the last."""
    with RunMetrics(made, run_dir) as metrics:
        for step in range(1, steps + 1):
            recorder = Recorder(None, lambda: 500.0)
            record(recorder, step)
            metrics.update(snapshot(step, records=recorder.after(-1)))
        with urllib.request.urlopen(f"http://{metrics.address}/metrics") as answer:
            return str(answer.read().decode())


def test_endpoint_parquet_and_tensorboard_have_the_same_numbers(tmp_path: Path) -> None:
    made = config(tmp_path)
    run_dir = create_run_dir(made)
    text = watch(made, run_dir)
    served = {
        name: float(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    }
    rows = [r for r in pq.read_table(run_dir.metrics_history).to_pylist() if r["step"] == 2]
    quoted = {f"{r['metric']}{_braces(r['labels'])}": r["value"] for r in rows}
    assert quoted == served
    (events,) = run_dir.tensorboard.iterdir()
    drawn = {tag: value for step, tag, value in scalars(events) if step == 2}
    assert drawn == pytest.approx(
        {tag(r["metric"], r["labels"]): r["value"] for r in rows if not r["metric"].endswith("_bucket")}
    )


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus")
def test_the_names_of_the_metrics_keep_the_rules_of_prometheus(tmp_path: Path) -> None:
    made = config(tmp_path)
    text = watch(made, create_run_dir(made))
    ended = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def _braces(labels: str) -> str:
    pairs = [pair.split("=", 1) for pair in labels.split(",") if pair]
    return "{" + ",".join(f'{k}="{v}"' for k, v in pairs) + "}" if pairs else ""


def scalars(path: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of a TensorBoard event file: records of length, its CRC, data, its CRC."""
    from tensorboardX.proto.event_pb2 import Event

    found, data = [], path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found


def test_the_address_is_named_for_prometheus_while_the_run_goes_on(tmp_path: Path) -> None:
    made = config(tmp_path)
    run_dir = create_run_dir(made)
    with RunMetrics(made, run_dir) as metrics:
        named = json.loads(run_dir.prometheus_targets.read_text())
        assert named == [{"targets": [metrics.address], "labels": {"run": "watched"}}]
        assert metrics.address.startswith("127.0.0.1:")
    assert not run_dir.prometheus_targets.exists()


def test_a_run_that_goes_on_adds_to_the_history(tmp_path: Path) -> None:
    made = config(tmp_path)
    run_dir = create_run_dir(made)
    watch(made, run_dir, steps=1)
    once = pq.read_table(run_dir.metrics_history).num_rows
    watch(made, run_dir, steps=1)
    assert pq.read_table(run_dir.metrics_history).num_rows == 2 * once
    assert len(list(run_dir.metrics_history.iterdir())) == 2


def test_the_history_keeps_a_bounded_number_of_rows_in_memory(tmp_path: Path) -> None:
    history = History(tmp_path / "history", clock=lambda: 0.0)
    for step in range(3):
        history.add(1.0, step, [("distrl_step", "", float(i)) for i in range(FLUSH_ROWS // 2)])
    # Two additions fill a part; the third waits.
    assert pq.read_table(tmp_path / "history").num_rows == FLUSH_ROWS
    history.flush()
    assert sorted(set(pq.read_table(tmp_path / "history")["step"].to_pylist())) == [0, 1, 2]


def test_a_port_that_is_taken_is_refused_before_anything_is_started() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        message = refusal(RefusedError, lambda: check_port(MetricsConfig(port=port)))
    assert message == (
        f"metrics.port must be free to listen at on metrics.host 127.0.0.1, got {port}: Address already in use; "
        "choose another, or 0 for any free one"
    )


def test_a_run_whose_port_is_taken_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.run.check_run", lambda config: None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        made = config(tmp_path, port=other.getsockname()[1])
        refusal(RefusedError, lambda: run_training(made))
    assert not made.run_dir.exists()


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    run_dir = create_run_dir(config(tmp_path))
    run_dir.metrics_history.write_text("a file where the directory should be")
    message = refusal(RunError, lambda: RunMetrics(config(tmp_path), run_dir))
    assert message == (
        f"run.dir: the metrics must be writable in {run_dir.metrics_history}, got: File exists; permit writing there, "
        "or make room"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user who may not write")
def test_a_directory_that_is_read_only_is_named(tmp_path: Path) -> None:
    run_dir = create_run_dir(config(tmp_path))
    run_dir.metrics_history.mkdir()
    run_dir.metrics_history.chmod(0o555)
    for folder in (run_dir.path, *run_dir.path.parents):
        if folder.stat().st_uid == 0 and folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    script = (
        "import os, sys; from pathlib import Path; from deploy.metrics.run import _check_writable; "
        "from deploy.run_dir import RunDir; os.setuid(65534); _check_writable(RunDir(Path(sys.argv[1])))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(run_dir.path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        f"distrl.errors.RunError: run.dir: the metrics must be writable in {run_dir.metrics_history}, got: Permission "
        "denied; permit writing there, or make room"
    )


def test_a_project_at_wandb_without_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.metrics.boards.find_spec", lambda name: None)
    assert refusal(ConfigError, lambda: check_wandb(config(tmp_path, wandb_project="mine"))) == (
        "metrics.wandb_project must be empty where the package wandb is not installed, got 'mine'; "
        "pip install 'distrl[wandb]', or remove it"
    )
    check_wandb(config(tmp_path))


def test_weights_and_biases_gets_the_numbers_of_every_step(tmp_path: Path) -> None:
    """In a process of its own: wandb starts threads and a service."""
    pytest.importorskip("wandb", reason="the package wandb is not installed: pip install 'distrl[wandb]'")
    script = (
        "import sys; from pathlib import Path; from tests.metrics.test_outputs import config, watch; "
        "from deploy.run_dir import create_run_dir; made = config(Path(sys.argv[1]), wandb_project='mine'); "
        "watch(made, create_run_dir(made))"
    )
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": ":".join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    (written,) = (tmp_path / "watched" / "wandb").glob("offline-run-*/run-watched.wandb")
    assert b"reward_mean" in written.read_bytes()
