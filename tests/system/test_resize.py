"""A learner gets more and fewer workers while its run runs: real processes, gloo between them."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from deploy.audit import audit_run
from deploy.process_table import read_processes
from deploy.run import run_training
from deploy.run_dir import RunDir
from deploy.scaling import scale_run
from deploy.start import start_ray
from distrl.config import Config, make_config
from distrl.errors import RefusedError
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.builders import refusal

pytestmark = [pytest.mark.ray, pytest.mark.nodes]

STEPS = 16
TICKETS = 4
WAIT_S = 120.0


def tiny_model(folder: Path) -> Path:
    size = TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64)
    make_tiny_model(folder / "model", character_tokenizer(ALPHABET), seed=0, architecture=size)
    return folder / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    start_ray()
    yield tiny_model(tmp_path_factory.mktemp("model"))
    ray.shutdown()


def config(model: Path, directory: Path, name: str, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": directory, "name": name},
        "model": {"path": model},
        "data": {"source": "sort_digits", "heldout_size": 16, "options": {"digits": 4}},
        "rollout": {"group_size": 4, "max_new_tokens": 6},
        "generation": {"actors": 1, "slots": 16},
        "train": {
            "steps": STEPS,
            "tickets_per_step": TICKETS,
            "learning_rate": 1e-3,
            # A checkpoint is being written at nearly every step, so also at the one after which a group leaves.
            "checkpoint_every_steps": 2,
            "max_staleness": 0,
        },
        "evaluation": {"problems": 16, "every_steps": 0},
    }
    return make_config(values, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def beside(settings: Config, play: Callable[[RunDir], None]) -> dict[str, Any]:
    """Trains, while `play` does something to the run in another thread; the summary."""
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            play(RunDir(settings.run_dir))
        except BaseException as error:
            failed.append(error)
            RunDir(settings.run_dir).stop_request.touch()
            raise

    thread = threading.Thread(target=guarded)
    thread.start()
    summary = run_training(settings)
    thread.join()
    assert failed == []
    return summary


def wait_until(condition: Callable[[], bool], wait_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def learners(run_dir: RunDir) -> list[dict[str, Any]]:
    return [row for row in read_processes(run_dir) if row["stage"] == "learner" and row["state"] == "up"]


def test_one_two_and_one_worker_train_what_one_worker_trains(model: Path, tmp_path: Path) -> None:
    alone = config(model, tmp_path, "alone")
    run_training(alone)

    def resize(run_dir: RunDir) -> None:
        wait_until(lambda: len(records(run_dir.path, "step")) > 3)
        for workers in (2, 1):
            assert scale_run(run_dir.path, {"learners": workers}, WAIT_S) == {"learners": workers}
            rows = learners(run_dir)
            assert len({row["pid"] for row in rows}) == workers
            done = len(records(run_dir.path, "step"))
            assert done < STEPS
            wait_until(lambda done=done: len(records(run_dir.path, "step")) > done)  # type: ignore[misc]
        message = refusal(RefusedError, lambda: scale_run(run_dir.path, {"learners": 17, "grading": 2}, WAIT_S))
        assert (
            message == "--learners must be at most the rollouts of a step (16), got 17; the others would have "
            "nothing to learn"
        )

    resized = config(model, tmp_path, "resized")
    beside(resized, resize)
    found = audit_run(resized.run_dir)
    assert found.violations == ()
    assert found.tickets["committed"] == STEPS * TICKETS
    one, other = (records(c.run_dir, "step") for c in (alone, resized))
    assert [r["step"] for r in other] == list(range(1, STEPS + 1))
    assert [r["metrics"]["loss"] for r in other] == pytest.approx([r["metrics"]["loss"] for r in one], abs=1e-5)
    assert [r["metrics"]["grad_norm"] for r in other] == pytest.approx(
        [r["metrics"]["grad_norm"] for r in one], rel=1e-3, abs=1e-5
    )
    # No version more than without: the group that goes on has the weights that are published.
    assert [r["version"] for r in records(resized.run_dir, "load")] == list(range(1, STEPS + 1))
    assert records(resized.run_dir, "rolled_back") == []
    assert records(resized.run_dir, "restarted") == []
    groups = [r for r in records(resized.run_dir, "learner") if "begins" in r["message"]]
    assert ["the first of 2" in r["message"] for r in groups] == [False, True, False]


def test_one_worker_of_two_is_killed_and_the_steps_since_the_checkpoint_are_made_again(
    model: Path, tmp_path: Path
) -> None:
    settings = config(model, tmp_path, "killed", **{"train.workers": 2, "train.checkpoint_every_steps": 3})

    def kill(run_dir: RunDir) -> None:
        wait_until(lambda: len(records(run_dir.path, "step")) > 4)
        first, second = learners(run_dir)
        os.kill(second["pid"], signal.SIGKILL)
        wait_until(lambda: bool(records(run_dir.path, "rolled_back")))
        wait_until(lambda: not {first["pid"], second["pid"]} & {row["pid"] for row in learners(run_dir)})
        assert len(learners(run_dir)) == 2

    beside(settings, kill)
    found = audit_run(settings.run_dir)
    assert found.violations == ()
    assert found.tickets["committed"] == STEPS * TICKETS
    assert len(records(settings.run_dir, "restarted")) == 1  # of the budget of failures
    steps = [r["step"] for r in records(settings.run_dir, "step")]
    again = sorted({step for step in steps if steps.count(step) > 1})
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    # Whole steps since the checkpoint, trained again under new versions; none before it.
    ((back,),) = [[int(r["message"].split()[2].rstrip(","))] for r in records(settings.run_dir, "rolled_back")]
    assert again == list(range(back + 1, back + 1 + len(again)))
    loaded = [r["version"] for r in records(settings.run_dir, "load")]
    assert loaded == sorted(set(loaded))
    assert loaded[-1] == STEPS + len(again) + 1
