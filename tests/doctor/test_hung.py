"""The doctor says who waits for whom, and shows what the process that is late is doing."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from deploy.doctor.hung import diagnose, guilty
from deploy.doctor.processes import of_stage, stack
from deploy.live import LiveState
from deploy.run_state import RunState, claim, write_state
from tests.metrics.snapshots import snapshot
from tests.report.runs import MadeRun, empty_run

QUIET = {"learner_waiting": False, "generation_held": False, "stopping": False, "failed": None, "done": False}


def hung_run(folder: Path, **changes: Any) -> MadeRun:
    made = empty_run(folder)
    claim(made.dir)
    now = [1000.0]
    live = LiveState(made.dir, lambda: now[0])
    seen = snapshot(3, **{**QUIET, "oldest": None, **changes})
    live.update(seen)
    now[0] = 1100.0
    live.update(seen)
    return made


def test_the_stage_of_the_oldest_ticket_is_the_one_that_is_waited_for(tmp_path: Path) -> None:
    made = hung_run(tmp_path, oldest={"ticket": 7, "stage": "grading", "since_s": 90.0})
    found = diagnose(made.dir, now_s=1101.0)
    assert found.stage == "grading"
    assert found.waits == "ticket 7 is in grading for 90 s; nothing has moved for 101 s"
    assert "grading.timeout_s" in found.remedy


def test_without_a_ticket_under_way_it_is_the_learner(tmp_path: Path) -> None:
    assert guilty({"oldest": None}) == "learner"
    found = diagnose(hung_run(tmp_path).dir, now_s=1101.0)
    assert found.waits == "the learner works on 2 tickets; nothing has moved for 101 s"


def test_a_coordinator_that_does_not_answer_is_named(tmp_path: Path) -> None:
    found = diagnose(hung_run(tmp_path).dir, now_s=1200.0)
    assert (found.stage, found.waits) == ("coordinator", "the driver has waited for the coordinator for 100 s")


def test_a_run_that_is_over_or_died_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = hung_run(tmp_path)
    write_state(made.dir, RunState.STOPPED)
    assert diagnose(made.dir).waits == "nobody: the run is not running"
    monkeypatch.setattr("deploy.doctor.hung.read_state", lambda run_dir: RunState.DIED)
    assert f"distrl resume {made.dir.path}" in diagnose(made.dir).remedy


def test_the_stack_of_a_process_names_the_function_that_it_is_in() -> None:
    """A driver with a child that Ray would have named so; both real."""
    child = textwrap.dedent(
        """
        import sys, time
        def a_grader_that_never_answers():
            print("here", flush=True)
            time.sleep(60)
        a_grader_that_never_answers()
        """
    )
    named = ["ray::GradingActor.grade", "-c", child]
    driver = f"import subprocess, sys; subprocess.run({named!r}, executable=sys.executable)"
    process = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "here\n"
        (found,) = of_stage("grading", process.pid)
        assert of_stage("learner", process.pid) == []
        deadline = time.monotonic() + 20
        while "a_grader_that_never_answers" not in (text := stack(found.pid)) and time.monotonic() < deadline:
            pass
        if "py-spy could not read" in text:
            pytest.skip(text)
        assert "a_grader_that_never_answers" in text
    finally:
        for one in of_stage("grading", process.pid):
            subprocess.run(["kill", str(one.pid)], check=False)
        process.wait(20)
        process.stdout.close()


def test_the_stack_of_a_process_that_is_gone_says_so() -> None:
    assert "could not read process 999999999" in stack(999999999)
