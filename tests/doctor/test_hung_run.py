"""A real run whose grader was stopped: the doctor names it, shows its stack, and what it says to do helps."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.doctor.hung import diagnose
from deploy.live import read_live
from deploy.process_table import read_processes
from deploy.run_dir import RunDir
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer

DEADLINE_S = 240.0
ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).with_name("distrl"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(name="config")
def a_run(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    size = TinyArchitecture(hidden_size=32, layers=1, heads=2, intermediate_size=64)
    make_tiny_model(model, character_tokenizer(ALPHABET), seed=0, architecture=size)
    values: dict[str, Any] = {
        "run": {"dir": str(tmp_path), "name": "hung"},
        "model": {"path": str(model)},
        "data": {"source": "sort_digits", "heldout_size": 8, "options": {"digits": 4}},
        "rollout": {"group_size": 4, "max_new_tokens": 6},
        "generation": {"slots": 16},
        "train": {"steps": 12, "tickets_per_step": 4},
        "evaluation": {"problems": 8, "every_steps": 0},
        # A process that does not answer is left to the doctor for the length of this test.
        "limits": {"liveness_timeout_s": 600.0},
        "grading": {"timeout_s": 600.0},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(name="driver")
def training(config: Path, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    command = [COMMAND, "train", str(config)]
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
    yield driver
    if driver.poll() is None:
        driver.terminate()
        driver.wait(DEADLINE_S)


def waits_in_grading_s(run: RunDir) -> float:
    """How long the ticket that waits longest has been in grading; 0 while it is elsewhere."""
    oldest = (read_live(run) or {}).get("oldest") or {"stage": ""}
    return float(oldest["since_s"]) if oldest["stage"] == "grading" else 0.0


@pytest.mark.ray
def test_a_stopped_grader_is_named_with_its_stack_and_goes_on_as_the_doctor_says(
    driver: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "hung")

    def wait_for(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not what():
            assert driver.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, diagnose(run).lines()
            time.sleep(0.1)

    wait_for(lambda: '"kind": "step"' in (run.metrics.read_text() if run.metrics.exists() else ""))
    (grader,) = [row["pid"] for row in read_processes(run) if row["stage"] == "grading"]
    os.kill(grader, signal.SIGSTOP)
    try:
        wait_for(lambda: waits_in_grading_s(run) >= 5)
        told = subprocess.run(
            [COMMAND, "doctor", "--run", str(run.path)],
            capture_output=True,
            text=True,
            check=False,
            env=ENVIRONMENT,
            timeout=DEADLINE_S,
        )
    finally:
        os.kill(grader, signal.SIGCONT)
    assert (told.returncode, told.stderr) == (0, "")
    lines = told.stdout.splitlines()
    assert lines[0] == "state   running"
    assert lines[1].startswith("waits   ticket ")
    assert " is in grading at grading-0 for " in lines[1]
    assert "; nothing has moved for " in lines[1]
    assert lines[2].startswith(f"guilty  grading: {grader} (ray::GradingActor")
    assert lines[3] == (f"note    {grader}: it is stopped, by SIGSTOP or a debugger: kill -CONT {grader} lets it go on")
    assert lines[4] == f"stack of {grader}:"
    assert "py-spy could not read" in told.stdout or "run_asyncio_loop" in told.stdout or "main_loop" in told.stdout
    assert lines[-1].startswith("do      the stack shows the grader's own code: give it a timeout")

    assert driver.wait(DEADLINE_S) == 0, (tmp_path / "log").read_text()
    assert json.loads(run.summary.read_text())["state"] == "finished"
