"""Looks at a run, or asks it to stop, from outside its process: by its directory alone."""

import json
import time
from pathlib import Path
from typing import Any

from deploy.progress import age_in_words
from deploy.run_dir import RunDir, find_run
from deploy.run_state import RunState, read_state
from distrl.errors import DeadlineError, RefusedError
from distrl.ledger_reader import LedgerReader

POLL_S = 0.2


def stop_run(path: Path, timeout_s: float) -> RunState:
    """Asks a run to stop and waits until it has; how it ended.

    Raises:
        RefusedError: there is no such run, or it is not running. DeadlineError: it did not end within `timeout_s`.
    """
    run_dir = find_run(path)
    state = read_state(run_dir)
    if state != RunState.RUNNING:
        raise RefusedError(f"{path}: the run must be running to be stopped, it is {state}")
    run_dir.stop_request.touch()
    deadline = time.monotonic() + timeout_s
    while (state := read_state(run_dir)) == RunState.RUNNING:
        if time.monotonic() > deadline:
            raise DeadlineError(f"{path}: the run must end within {timeout_s:g} s of being asked to, it still runs")
        time.sleep(POLL_S)
    return state


def run_status(path: Path) -> dict[str, Any]:
    """What a run has done so far: state, step, the last step's reward and staleness, evaluations, tickets, drops.

    Raises:
        RefusedError: there is no such run.
    """
    run_dir = find_run(path)
    state = read_state(run_dir)
    status: dict[str, Any] = {"run": str(path), "state": state, "step": 0, "tickets": {}, "dropped": {}}
    if run_dir.ledger.exists():
        with LedgerReader(run_dir.ledger) as ledger:
            checkpoint = ledger.last_checkpoint()
            status["tickets"], status["dropped"] = ledger.counts(), ledger.drops()
            status["evaluations"] = ledger.evaluations()
            status["checkpoint"] = None if checkpoint is None else checkpoint.path
    step = _last_step(run_dir)
    if step is not None:
        status |= {key: step[key] for key in ("step", "reward_mean", "staleness_mean", "staleness_max", "time_s")}
    return status


def describe(status: dict[str, Any]) -> list[str]:
    """A status in words, one line per part."""
    lines = [f"{status['run']}: {status['state']}, {status['step']} steps done"]
    if "reward_mean" in status:
        lines.append(
            f"last step   reward {status['reward_mean']:.3f}, staleness {age_in_words(status)}, "
            f"{time.time() - status['time_s']:.0f} s ago"
        )
    for evaluation in status.get("evaluations", [])[-1:]:
        lines.append(
            f"held-out    {evaluation['accuracy']:.3f} ± {evaluation['standard_error']:.3f} on "
            f"{evaluation['responses']} problems at step {evaluation['step']}"
        )
    tickets = ", ".join(f"{count} {state}" for state, count in status["tickets"].items() if count)
    lines.append(f"tickets     {tickets or 'none'}")
    if status["dropped"]:
        lines.append("dropped     " + ", ".join(f"{count} {reason}" for reason, count in status["dropped"].items()))
    lines.append(f"checkpoint  {status.get('checkpoint') or 'none yet'}")
    return lines


def _last_step(run_dir: RunDir) -> dict[str, Any] | None:
    if not run_dir.metrics.exists():
        return None
    last = None
    with run_dir.metrics.open() as file:
        for line in file:
            if line.endswith("\n") and '"kind": "step"' in line:  # the last line may be half written
                last = line
    return None if last is None else json.loads(last)
