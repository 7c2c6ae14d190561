"""Another number of processes for a stage of a run that is running: asked for in its directory, done by its driver."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from deploy.process_table import read_processes
from deploy.run_dir import RunDir, find_run
from deploy.run_state import RunState, read_state
from deploy.supervisor import State
from distrl.config import Config, load_config
from distrl.errors import DeadlineError, RefusedError, RunError

POLL_S = 0.2
ROWS = {"learners": "learner"}
"""How stages are called in the table of processes, where it is not their own name."""


def scale_run(path: Path, counts: Mapping[str, int], timeout_s: float) -> dict[str, int]:
    """Asks a run for other numbers of processes and waits until these are up and the others have ended.

    Args:
        counts: processes wanted, by stage; stages that are not named stay as they are.
    Returns:
        What is up of each stage that was named.
    Raises:
        RefusedError: there is no such run, it is not running, its processes cannot be scaled, its cluster has no room
            for them, or another request waits.
        RunError: it ended meanwhile. DeadlineError: it was not done within `timeout_s`; the run goes on with it.
    """
    run_dir = find_run(path)
    state = read_state(run_dir)
    if state != RunState.RUNNING:
        raise RefusedError(f"{path}: the run must be running to be scaled, it is {state}")
    check_counts(load_config(run_dir.config), counts)
    _ask(run_dir, counts)
    deadline = time.monotonic() + timeout_s
    refusal = run_dir.scale_refusal(os.getpid())
    while run_dir.scale_request.exists() or not _are_up(run_dir, counts):
        if refusal.exists():
            message = refusal.read_text()
            refusal.unlink()
            raise RefusedError(message)
        if (state := read_state(run_dir)) != RunState.RUNNING:
            run_dir.scale_request.unlink(missing_ok=True)
            raise RunError(f"{path}: the run must be running to be scaled, it is {state} now")
        if time.monotonic() > deadline:
            wanted = ", ".join(f"{count} of {stage}" for stage, count in counts.items())
            raise DeadlineError(
                f"{path}: {wanted} must be up within {timeout_s:g} s of being asked for, they are not yet; the run "
                f"goes on with it, see {run_dir.processes}"
            )
        time.sleep(POLL_S)
    return dict(counts)


def check_counts(config: Config, counts: Mapping[str, int]) -> None:
    """Refuses numbers that a run cannot have.

    Raises:
        RefusedError: nothing was asked of the run.
    """
    if not counts:
        raise RefusedError(
            "scale must have a number of processes, got none; give --generation N, --grading N or --learners N"
        )
    for stage, count in counts.items():
        if count < 1:
            raise RefusedError(f"--{stage} must be at least 1, got {count}; distrl stop ends a run")
    rollouts = config.train.tickets_per_step * config.rollout.group_size
    if counts.get("learners", 0) > rollouts:
        raise RefusedError(
            f"--learners must be at most the rollouts of a step ({rollouts}), got {counts['learners']}; the others "
            "would have nothing to learn"
        )
    if "generation" in counts and config.offline:
        raise RefusedError(
            f"--generation must be left out where replay.ratio is 1, got {counts['generation']}: the run samples "
            "nothing for training, and these actors would have nothing to do"
        )
    if "grading" in counts and not config.samples:
        raise RefusedError(
            f"--grading must be left out where nothing is sampled (replay.ratio is 1 and generation.evaluation_actors "
            f"is 0), got {counts['grading']}: recorded rewards are taken as they are"
        )
    if "generation" in counts and config.placement.mode != "cpu":
        raise RefusedError(
            f"--generation must be left out where generation has GPUs (placement.mode={config.placement.mode}), got "
            f"{counts['generation']}: they were reserved for generation.actors={config.generation.actors} at the start"
        )


def take_request(run_dir: RunDir) -> dict[str, int] | None:
    """What the run is asked for, None where it is not; the driver does it, and then calls `done`."""
    try:
        text = run_dir.scale_request.read_text()
    except FileNotFoundError:
        return None
    return {str(stage): int(count) for stage, count in json.loads(text)["counts"].items()}


def done(run_dir: RunDir) -> None:
    """Says that the request was taken up, and lets the next one be made. The table of processes shows it already."""
    run_dir.scale_request.unlink(missing_ok=True)


def refuse(run_dir: RunDir, message: str) -> None:
    """Says that the request was not taken up, and why; nothing was changed."""
    asker = json.loads(run_dir.scale_request.read_text())["asker"]
    refusal = run_dir.scale_refusal(asker)
    aside = refusal.with_name(refusal.name + ".partial")
    aside.write_text(message)
    aside.replace(refusal)
    done(run_dir)


def _ask(run_dir: RunDir, counts: Mapping[str, int]) -> None:
    aside = run_dir.scale_request.with_name(f"scale.json.{os.getpid()}")
    aside.write_text(json.dumps({"asker": os.getpid(), "counts": dict(counts)}) + "\n")
    run_dir.scale_refusal(os.getpid()).unlink(missing_ok=True)  # of a process that had this id before
    try:
        os.link(aside, run_dir.scale_request)  # whole, and only where there is none
    except FileExistsError:
        raise RefusedError(
            f"{run_dir.path}: a run can be asked for one change at a time, another one waits; try again"
        ) from None
    finally:
        aside.unlink()


def _are_up(run_dir: RunDir, counts: Mapping[str, int]) -> bool:
    """Whether each stage has as many processes as wanted, all of them up, and none that still drains."""
    rows = read_processes(run_dir)
    for stage, count in counts.items():
        states = [row["state"] for row in rows if row["stage"] == ROWS.get(stage, stage)]
        if states != [State.UP] * count:
            return False
    return True
