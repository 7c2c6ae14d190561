"""Whether a run is running, and how it ended: the part of `run.json` that changes."""

import fcntl
import json
import os
import time
from enum import StrEnum
from typing import Any

from deploy.run_dir import FORMAT, RunDir, write_json
from distrl.errors import RefusedError, RunError


class RunState(StrEnum):
    CREATED = "created"
    """It has a directory, and nothing was started yet."""
    RUNNING = "running"
    FINISHED = "finished"
    """All steps are done."""
    STOPPED = "stopped"
    """It was asked to stop; it can be resumed."""
    FAILED = "failed"
    DIED = "died"
    """Its process is gone without having said how it ended."""


def claim(run_dir: RunDir) -> int:
    """Marks the run as running in this process, which holds a lock until it lets go of it or ends.

    Returns:
        The lock, for `release`.
    Raises:
        RefusedError: another process runs it. RunError: the directory cannot be written.
    """
    try:
        lock = os.open(run_dir.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"{run_dir.lock}: must be writable: {error.strerror}; mend the run's directory") from error
    try:
        # Two drivers may look at run.json at the same moment; only one of them gets the lock.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if run_dir.run_json.exists() and read_state(run_dir) == RunState.RUNNING:
            raise BlockingIOError
        run_dir.stop_request.unlink(missing_ok=True)
        run_dir.scale_request.unlink(missing_ok=True)
        process = {"pid": os.getpid(), "process_started": _process_start(os.getpid()), "started_s": time.time()}
        record = {"format": FORMAT, "name": run_dir.path.name, **process, "state": RunState.RUNNING}
        write_json(run_dir.run_json, record)
    except BlockingIOError:
        os.close(lock)
        raise RefusedError(
            f"{run_dir.path}: the run must not be running, process {_read(run_dir).get('pid', 'of another driver')} "
            "runs it"
        ) from None
    except BaseException:
        os.close(lock)
        raise
    return lock


def release(run_dir: RunDir, lock: int, state: RunState) -> None:
    """Says how the run ended, and lets others claim it."""
    try:
        write_state(run_dir, state)
    finally:
        os.close(lock)


def write_state(run_dir: RunDir, state: RunState) -> None:
    write_json(run_dir.run_json, {**_read(run_dir), "state": state, "ended_s": time.time()})


def read_state(run_dir: RunDir) -> RunState:
    """How the run is doing.

    Raises:
        RunError: the directory is not that of a run, or of a newer format.
    """
    values = _read(run_dir)
    state = RunState(values["state"])
    if state == RunState.RUNNING and _process_start(values["pid"]) != values["process_started"]:
        return RunState.DIED
    return state


def driver_pid(run_dir: RunDir) -> int:
    """The process that runs a run, or ran it last."""
    return int(_read(run_dir)["pid"])


def _read(run_dir: RunDir) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(run_dir.run_json.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{run_dir.path}: must be the directory of a run, with a readable run.json ({error}); runs lie in run.dir"
        ) from error
    if values["format"] > FORMAT:
        raise RunError(
            f"{run_dir.path}: the format of run.json must be at most {FORMAT}, got {values['format']}; use the distrl "
            "that wrote it"
        )
    return values


def _process_start(pid: int) -> str | None:
    """When a process started, in the kernel's ticks: with the id it names a process, ids alone are used again."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return None
