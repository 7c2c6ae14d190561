"""Runs a training run from its first process to its summary, anew or from where it stopped."""

import time
from pathlib import Path
from typing import Any

import ray

from deploy.check import RunPlan, check_run
from deploy.checkpoints import last_checkpoint
from deploy.interrupt import stop_on_interrupt
from deploy.learner import RayTrainGroup
from deploy.metrics.boards import check_wandb
from deploy.metrics.endpoint import check_port
from deploy.metrics.run import RunMetrics
from deploy.placement import reserve
from deploy.progress import Progress, Silent
from deploy.run_dir import RunDir, create_run_dir, find_run, write_json
from deploy.run_state import RunState, claim, read_state, release
from deploy.stall import StallWatch
from deploy.start import Handles, log_directory, start_actors, start_ray, wait_for_actors
from deploy.summary import summarize
from distrl.config import Config, load_config
from distrl.errors import RefusedError, RunError
from learners.group import GroupStatus

POLL_S = 0.2
STOP_S = 30.0
"""Seconds that the learner's processes get to end."""


def run_training(config: Config, progress: Progress | None = None) -> dict[str, Any]:
    """Trains as the config says and returns the summary, which is also in the run's `summary.json`.

    Raises:
        ConfigError, DataError: the config cannot be run.
        RefusedError: the run's directory exists. RunError: the run failed; the message has the cause.
    """
    plan = check_run(config)
    check_wandb(config)
    check_port(config.metrics)
    return _run(config, plan, create_run_dir(config), None, progress or Silent())


def resumable(path: Path) -> tuple[Config, RunDir, Path]:
    """What is needed to go on with a run: its config, its directory, and the checkpoint that its ledger names last.

    Raises:
        RefusedError: there is no such run, it is running or finished, or it has no checkpoint.
    """
    run_dir = find_run(path)
    state = read_state(run_dir)
    if state == RunState.RUNNING:
        raise RefusedError(f"{path}: the run must not be running to be resumed; stop it with: distrl stop {path}")
    if state == RunState.FINISHED:
        raise RefusedError(
            f"{path}: the run must have steps left to be resumed, it has done all of them; start a new one"
        )
    checkpoint = last_checkpoint(run_dir)
    if checkpoint is None:
        raise RefusedError(
            f"{path}: the run must have a checkpoint to be resumed, it ended before the first; start anew"
        )
    return load_config(run_dir.config), run_dir, checkpoint


def resume_training(path: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Goes on with a run that was stopped, from its last checkpoint; see `run_training`.

    Raises:
        RefusedError: it cannot be resumed (see `resumable`). RunError: it failed.
    """
    config, run_dir, checkpoint = resumable(path)
    return _run(config, check_run(config), run_dir, checkpoint, progress or Silent())


def _run(config: Config, plan: RunPlan, run_dir: RunDir, checkpoint: Path | None, progress: Progress) -> dict[str, Any]:
    began = time.time()
    lock = claim(run_dir)
    outcome = RunState.FAILED
    try:
        with progress, RunMetrics(config, run_dir) as metrics:
            progress.phase("starting Ray")
            own_ray = start_ray()
            try:
                snapshot = _run_actors(config, plan, run_dir, checkpoint, progress, metrics)
            except BaseException:
                progress.line(f"what the processes of the run wrote: {log_directory()}")
                raise
            finally:
                if own_ray:
                    ray.shutdown()
            outcome = RunState.FINISHED if snapshot["done"] else RunState.STOPPED
            summary = summarize(run_dir, snapshot, state=outcome, wall_s=time.time() - began)
            write_json(run_dir.summary, summary)
            progress.finish(summary, run_dir.path)
    finally:
        release(run_dir, lock, outcome)
    return summary


def _run_actors(
    config: Config,
    plan: RunPlan,
    run_dir: RunDir,
    checkpoint: Path | None,
    progress: Progress,
    metrics: RunMetrics,
) -> dict[str, Any]:
    """Starts actors and learner, watches them until the run is done or stopped, and ends them; the last snapshot."""
    progress.phase("starting actors and learner")
    reservation = reserve(config, plan)
    handles = start_actors(config, run_dir, plan, reservation)
    group = RayTrainGroup(config, run_dir, handles.coordinator, handles.store, checkpoint)
    group.start()
    try:
        wait_for_actors(config, handles)
        progress.phase("evaluating the model before training" if checkpoint is None else f"going on from {checkpoint}")
        ray.get(handles.coordinator.start.remote(), timeout=config.limits.start_timeout_s)
        return _watch(config, run_dir, handles, group, progress, metrics)
    finally:
        # A learner that still waits for a batch gets an error for it, so that its group ends before Ray does.
        handles.coordinator.abort.remote("the run has ended")
        group.stop(timeout_s=STOP_S)
        for handle in handles.all():
            ray.kill(handle)
        reservation.release()


def _watch(
    config: Config,
    run_dir: RunDir,
    handles: Handles,
    group: RayTrainGroup,
    progress: Progress,
    metrics: RunMetrics,
) -> dict[str, Any]:
    """Shows the run's progress until it is done or stopped; raises what ended it."""
    seen = -1
    stall = StallWatch(config.limits.stall_warning_s)
    stopping = False
    with stop_on_interrupt() as interrupted:
        while True:
            try:
                snapshot: dict[str, Any] = ray.get(
                    handles.coordinator.snapshot.remote(seen), timeout=config.limits.publish_timeout_s
                )
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                raise RunError(f"the coordinator does not answer: {type(error).__name__}") from error
            if snapshot["records"]:
                seen = snapshot["records"][-1]["number"]
            metrics.update(snapshot)
            progress.update(snapshot)
            if warning := stall.look(snapshot, time.monotonic()):
                progress.line(warning)
            if snapshot["failed"]:
                raise RunError(snapshot["failed"])
            if group.status() == GroupStatus.FAILED:
                raise group.error() or RunError("the learner failed")
            if group.status() == GroupStatus.FINISHED and (snapshot["done"] or snapshot["stopping"]):
                return snapshot  # the learner has committed its last checkpoint
            if not stopping and (interrupted.is_set() or run_dir.stop_request.exists()):
                stopping = True
                progress.line("stopping: the step under way is finished and a checkpoint made")
                handles.coordinator.request_stop.remote()
            time.sleep(POLL_S)
