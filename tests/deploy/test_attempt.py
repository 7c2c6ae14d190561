"""Which of starting, going on, refusing and leaving alone an attempt of a run does."""

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from deploy import attempt
from deploy.attempt import resume_or_start
from deploy.checkpoints import last_checkpoint
from deploy.run import unfinished
from deploy.run_dir import create_run_dir, write_json
from deploy.run_state import RunState, claim, release, write_state
from distrl.config import Config, make_config
from distrl.errors import RefusedError
from distrl.ledger import Ledger
from tests.builders import refusal


def config(folder: Path, **train: Any) -> Config:
    values = {"run": {"dir": str(folder), "name": "mine"}, "model": {"path": str(folder / "model")}}
    return make_config({**values, "data": {"source": "sort_digits"}, "train": train})


@pytest.fixture(name="done")
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called instead of training."""
    made: list[str] = []

    def start(config: Config, progress: object) -> dict[str, Any]:
        made.append("start")
        create_run_dir(config)
        return {}

    def go_on(path: Path, progress: object, config: Config) -> dict[str, Any]:
        made.append(f"go on with {config.run.name}")
        return {}

    monkeypatch.setattr(attempt, "run_training", start)
    monkeypatch.setattr(attempt, "resume_training", go_on)
    return made


def test_the_first_attempt_starts_and_the_next_go_on_also_without_a_checkpoint(tmp_path: Path, done: list[str]) -> None:
    for _ in range(3):
        resume_or_start(config(tmp_path))
    assert done == ["start", "go on with mine", "go on with mine"]
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_directory_that_was_not_complete_is_put_aside(tmp_path: Path, done: list[str]) -> None:
    for _ in range(2):
        resume_or_start(config(tmp_path))
        (tmp_path / "mine" / "run.json").unlink()  # as if its driver had died while it made the directory
    resume_or_start(config(tmp_path))
    assert done == ["start"] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "mine.abandoned-1", "mine.abandoned-2"]


def test_a_run_goes_on_with_the_secrets_that_its_directory_does_not_keep(tmp_path: Path, done: list[str]) -> None:
    for key in ("one", "another that replaced it"):
        made = config(tmp_path)
        data = made.data.model_copy(update={"options": {"api_key": key}})
        resume_or_start(made.model_copy(update={"data": data}))
    assert done == ["start", "go on with mine"]


def test_a_finished_run_is_left_alone_so_that_its_job_succeeds(tmp_path: Path, done: list[str]) -> None:
    made = config(tmp_path)
    run_dir = create_run_dir(made)
    write_json(run_dir.summary, {"state": "finished", "steps": 3})
    write_state(run_dir, RunState.FINISHED)
    assert resume_or_start(made) == {"state": "finished", "steps": 3}
    assert done == []


def test_another_config_and_a_run_that_goes_on_are_refused(tmp_path: Path, done: list[str]) -> None:
    run_dir = create_run_dir(config(tmp_path, steps=5))
    assert refusal(RefusedError, lambda: resume_or_start(config(tmp_path, steps=6))) == (
        f"train.steps: a run goes on with the config it began with, {run_dir.path} has 5, got 6; give the run's "
        "config, or choose a new run.name"
    )
    message = refusal(RefusedError, lambda: resume_or_start(config(tmp_path, steps=6, max_staleness=5)))
    assert " has 5, got 6 and 1 more; " in message
    lock = claim(run_dir)
    try:
        message = refusal(RefusedError, lambda: resume_or_start(config(tmp_path, steps=5)))
    finally:
        release(run_dir, lock, RunState.STOPPED)
    assert message == f"{run_dir.path}: the run must not be running, another process runs it"
    assert done == []


def test_a_run_whose_ledger_was_only_just_made_when_it_was_killed_goes_on(tmp_path: Path, done: list[str]) -> None:
    """A file that SQLite has opened and in which there is no table yet."""
    made = config(tmp_path)
    run_dir = create_run_dir(made)
    release(run_dir, claim(run_dir), RunState.FAILED)
    with contextlib.closing(sqlite3.connect(run_dir.ledger)) as db:
        db.execute("PRAGMA journal_mode=WAL")
    assert last_checkpoint(run_dir) is None
    assert unfinished(run_dir.path) == (run_dir, None)
    Ledger(run_dir.ledger).close()
    assert last_checkpoint(run_dir) is None


def test_a_ledger_has_all_its_tables_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrl.ledger_tables.TABLES", "CREATE TABLE meta (key TEXT, value TEXT); CREATE TABLE oops (;")
    with pytest.raises(sqlite3.OperationalError, match="syntax error"):
        Ledger(tmp_path / "ledger.sqlite")
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        assert db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone() == (0,)
