"""Asking a run for another number of processes by its directory."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import scaling
from deploy.process_table import write_processes
from deploy.run_dir import RunDir, create_run_dir
from deploy.run_state import RunState, claim, release, write_state
from deploy.scaling import done, refuse, scale_run, take_request
from deploy.supervisor import Process, State
from distrl.config import make_config
from distrl.errors import DeadlineError, RefusedError, RunError
from tests.builders import refusal


@pytest.fixture(name="run_dir")
def running(tmp_path: Path) -> Iterator[RunDir]:
    values: dict[str, Any] = {"run": {"dir": tmp_path, "name": "mine"}, "model": {"path": tmp_path}}
    run_dir = create_run_dir(make_config({**values, "data": {"source": "sort_digits"}}))
    lock = claim(run_dir)
    yield run_dir
    release(run_dir, lock, RunState.STOPPED)


def table(run_dir: RunDir, *states: State) -> None:
    write_processes(run_dir, [Process("grading", f"grading-{i}", "", None, s, 0.0) for i, s in enumerate(states)])


def test_it_returns_when_the_new_ones_are_up_and_those_too_many_have_ended(run_dir: RunDir) -> None:
    returned = threading.Event()
    seen: list[bool] = []

    def driver() -> None:
        while (asked := take_request(run_dir)) is None:
            pass
        assert asked == {"grading": 2}
        for states in ([State.UP] * 3, [State.UP, State.STARTING], [State.UP, State.UP, State.DRAINING]):
            table(run_dir, *states)
            done(run_dir)
            seen.append(returned.wait(3 * scaling.POLL_S))
        table(run_dir, State.UP, State.UP)

    thread = threading.Thread(target=driver)
    thread.start()
    assert scale_run(run_dir.path, {"grading": 2}, 30) == {"grading": 2}
    returned.set()
    thread.join()
    assert seen == [False, False, False]
    assert sorted(p.name for p in run_dir.path.glob("scale.json*")) == []


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "scale must have a number of processes, got none; give --generation N, --grading N or --learners N"),
        ({"grading": 2, "generation": 0}, "--generation must be at least 1, got 0; distrl stop ends a run"),
        ({"learners": 0}, "--learners must be at least 1, got 0; distrl stop ends a run"),
        (
            {"learners": 513},
            "--learners must be at most the rollouts of a step (512), got 513; the others would have nothing to learn",
        ),
    ],
)
def test_numbers_that_a_run_cannot_have_are_refused(run_dir: RunDir, counts: dict[str, int], message: str) -> None:
    assert refusal(RefusedError, lambda: scale_run(run_dir.path, counts, 1)) == message
    assert take_request(run_dir) is None


def test_generation_that_has_gpus_is_refused_and_grading_is_not(tmp_path: Path) -> None:
    values: dict[str, Any] = {"run": {"dir": tmp_path}, "model": {"path": tmp_path}, "data": {"source": "sort_digits"}}
    gpus = {"generation": {"engine": "vllm", "actors": 2}, "placement": {"mode": "separate"}}
    config = make_config({**values, **gpus, "train": {"device": "cuda"}})
    scaling.check_counts(config, {"grading": 3})
    assert refusal(RefusedError, lambda: scaling.check_counts(config, {"generation": 3})) == (
        "--generation must be left out where generation has GPUs (placement.mode=separate), got 3: they were reserved "
        "for generation.actors=2 at the start"
    )


def test_an_offline_run_gets_nobody_who_would_have_nothing_to_do(tmp_path: Path) -> None:
    values: dict[str, Any] = {"run": {"dir": tmp_path}, "model": {"path": tmp_path}, "data": {"source": "sort_digits"}}
    offline = make_config({**values, "replay": {"journal": str(tmp_path)}})
    scaling.check_counts(offline, {"learners": 2})
    assert refusal(RefusedError, lambda: scaling.check_counts(offline, {"generation": 2})) == (
        "--generation must be left out where replay.ratio is 1, got 2: the run samples nothing for training, and these "
        "actors would have nothing to do"
    )
    assert refusal(RefusedError, lambda: scaling.check_counts(offline, {"grading": 2})) == (
        "--grading must be left out where nothing is sampled (replay.ratio is 1 and generation.evaluation_actors is "
        "0), got 2: recorded rewards are taken as they are"
    )
    mixed = make_config({**values, "replay": {"journal": str(tmp_path), "ratio": 0.5}})
    scaling.check_counts(mixed, {"generation": 2, "grading": 2})


def test_a_run_that_does_not_run_is_refused(run_dir: RunDir) -> None:
    write_state(run_dir, RunState.STOPPED)
    message = refusal(RefusedError, lambda: scale_run(run_dir.path, {"grading": 2}, 1))
    assert message == f"{run_dir.path}: the run must be running to be scaled, it is stopped"


def test_a_second_request_is_refused_while_one_waits_and_the_first_stays(run_dir: RunDir) -> None:
    with pytest.raises(DeadlineError):
        scale_run(run_dir.path, {"grading": 2}, 0)
    assert refusal(RefusedError, lambda: scale_run(run_dir.path, {"grading": 5}, 0)) == (
        f"{run_dir.path}: a run can be asked for one change at a time, another one waits; try again"
    )
    assert take_request(run_dir) == {"grading": 2}


def test_a_run_that_ends_meanwhile_is_told_and_keeps_no_request(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling.time, "sleep", lambda seconds: write_state(run_dir, RunState.FINISHED))
    message = refusal(RunError, lambda: scale_run(run_dir.path, {"grading": 2}, 30))
    assert message == f"{run_dir.path}: the run must be running to be scaled, it is finished now"
    assert take_request(run_dir) is None


def test_a_late_run_is_named_with_what_is_missing(run_dir: RunDir) -> None:
    assert refusal(DeadlineError, lambda: scale_run(run_dir.path, {"grading": 2}, 0)) == (
        f"{run_dir.path}: 2 of grading must be up within 0 s of being asked for, they are not yet; the run goes on "
        f"with it, see {run_dir.processes}"
    )


def test_what_the_driver_refuses_is_told_to_who_asked_and_the_next_request_is_taken(run_dir: RunDir) -> None:
    def driver() -> None:
        while take_request(run_dir) is None:
            pass
        refuse(run_dir, "no room")

    thread = threading.Thread(target=driver)
    thread.start()
    assert refusal(RefusedError, lambda: scale_run(run_dir.path, {"learners": 4}, 30)) == "no room"
    thread.join()
    assert sorted(p.name for p in run_dir.path.glob("scale*")) == []
    table(run_dir, State.UP)
    with pytest.raises(DeadlineError):
        scale_run(run_dir.path, {"grading": 2}, 0)
    assert take_request(run_dir) == {"grading": 2}
