"""Looking at a run and stopping it by its directory."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploy import control
from deploy.interrupt import stop_on_interrupt
from deploy.run import resumable
from deploy.run_dir import RunDir, write_json
from deploy.run_state import RunState, claim, read_state, release, write_state
from distrl.errors import DeadlineError, RefusedError, RunError
from distrl.ledger import Ledger


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "mine")
    found.path.mkdir()
    return found


def dead_process(run_dir: RunDir) -> None:
    """Writes the state that a killed process leaves."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    values = {"format": 1, "name": "mine", "pid": child.pid, "process_started": "1", "state": "running"}
    write_json(run_dir.run_json, values)


def test_a_run_is_running_while_its_process_lives_and_died_after_that(run_dir: RunDir) -> None:
    claim(run_dir)
    assert read_state(run_dir) == RunState.RUNNING
    dead_process(run_dir)
    assert read_state(run_dir) == RunState.DIED


def test_a_process_id_that_was_used_again_is_not_the_run(run_dir: RunDir) -> None:
    claim(run_dir)
    values = {"format": 1, "name": "mine", "pid": os.getpid(), "process_started": "1", "state": "running"}
    write_json(run_dir.run_json, values)
    assert read_state(run_dir) == RunState.DIED


def test_a_run_that_is_running_is_not_claimed_twice(run_dir: RunDir) -> None:
    claim(run_dir)
    with pytest.raises(RefusedError) as error:
        claim(run_dir)
    assert str(error.value) == f"{run_dir.path}: the run must not be running, process {os.getpid()} runs it"


def test_of_two_drivers_that_look_at_the_same_moment_one_is_refused(run_dir: RunDir) -> None:
    write_json(run_dir.run_json, {"format": 1, "name": "mine", "state": "stopped"})
    lock = os.open(run_dir.lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)  # the other has the lock, and has not written run.json yet
    before = run_dir.run_json.read_text()
    with pytest.raises(RefusedError) as error:
        claim(run_dir)
    assert str(error.value) == f"{run_dir.path}: the run must not be running, process of another driver runs it"
    assert run_dir.run_json.read_text() == before
    os.close(lock)
    release(run_dir, claim(run_dir), RunState.STOPPED)
    release(run_dir, claim(run_dir), RunState.STOPPED)


def test_stop_asks_waits_and_tells_how_the_run_ended(run_dir: RunDir) -> None:
    claim(run_dir)

    def driver() -> None:
        while not run_dir.stop_request.exists():
            pass
        write_state(run_dir, RunState.STOPPED)

    thread = threading.Thread(target=driver)
    thread.start()
    assert control.stop_run(run_dir.path, timeout_s=20) == RunState.STOPPED
    thread.join()


def test_a_run_that_does_not_end_in_time_is_said(run_dir: RunDir) -> None:
    claim(run_dir)
    with pytest.raises(DeadlineError) as error:
        control.stop_run(run_dir.path, timeout_s=0)
    assert str(error.value) == f"{run_dir.path}: the run must end within 0 s of being asked to, it still runs"


def test_only_a_running_run_can_be_stopped(run_dir: RunDir) -> None:
    claim(run_dir)
    write_state(run_dir, RunState.FINISHED)
    with pytest.raises(RefusedError) as error:
        control.stop_run(run_dir.path, timeout_s=1)
    assert str(error.value) == f"{run_dir.path}: the run must be running to be stopped, it is finished"


def test_a_directory_that_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as error:
        control.run_status(tmp_path)
    assert str(error.value) == (
        f"RUN: {tmp_path} must be a run directory, it has no run.json; give the folder that `distrl train` made, such "
        "as runs/NAME"
    )


def test_a_run_of_a_newer_format_is_refused(run_dir: RunDir) -> None:
    write_json(run_dir.run_json, {"format": 2, "state": "running"})
    with pytest.raises(RunError) as error:
        read_state(run_dir)
    assert str(error.value) == (
        f"{run_dir.path}: the format of run.json must be at most 1, got 2; use the distrl that wrote it"
    )


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (RunState.RUNNING, "the run must not be running to be resumed; stop it with: distrl stop {}"),
        (RunState.FINISHED, "the run must have steps left to be resumed, it has done all of them; start a new one"),
    ],
)
def test_a_run_that_cannot_go_on_is_refused(run_dir: RunDir, state: RunState, message: str) -> None:
    claim(run_dir)
    write_state(run_dir, state)
    Ledger(run_dir.ledger).close()
    with pytest.raises(RefusedError) as error:
        resumable(run_dir.path)
    assert str(error.value) == f"{run_dir.path}: " + message.format(run_dir.path)


def test_status_tells_tickets_and_checkpoint_of_a_run_without_steps(run_dir: RunDir) -> None:
    claim(run_dir)
    ledger = Ledger(run_dir.ledger)
    ledger.allocate_version(None, 0)
    ledger.issue(lambda ticket_id: "a prompt")
    ledger.close()
    status = control.run_status(run_dir.path)
    assert control.describe(status) == [
        f"{run_dir.path}: running, 0 steps done",
        "tickets     1 issued",
        "checkpoint  none yet",
    ]


def test_the_first_interrupt_asks_and_the_second_ends() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
