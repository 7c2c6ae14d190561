"""Processes of a real run are killed, added and drained; `make chaos` has the long form."""

import random
from pathlib import Path

import pytest

from deploy.audit import audit_run
from deploy.scaling import scale_run
from tests.system.chaos import TICKETS_PER_STEP, Run, play

pytestmark = pytest.mark.ray


def test_processes_of_a_run_are_killed_and_every_ticket_is_trained_once(tmp_path: Path) -> None:
    # The coordinator first: the learner's row must outlive it.
    found = play(["coordinator", "learner", "generation"], random.Random(1), tmp_path, steps=20)
    assert found.tickets["committed"] == 20 * TICKETS_PER_STEP


def test_a_run_that_runs_gets_more_generation_actors_and_fewer_grading_actors(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=40)
    try:
        run.wait_for("learner")
        assert scale_run(run.path, {"generation": 3, "grading": 1}, 120) == {"generation": 3, "grading": 1}
        up = sorted(row["name"] for row in run.rows() if row["stage"] in ("generation", "grading"))
        assert up == ["generation-0", "generation-1", "generation-2", "grading-0"]
        assert run.process.wait(300) == 0
    finally:
        run.end()
    found = audit_run(run.path)
    assert found.violations == ()
    assert found.tickets["committed"] == 40 * TICKETS_PER_STEP
    assert found.drops == {}
    text = (run.path / "metrics.jsonl").read_text()
    assert "generation: 3 processes instead of 2" in text
    assert '"actor": "generation-2"' in text  # it loaded weights, and so it was one of those that sample
