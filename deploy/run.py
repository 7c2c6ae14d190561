"""Runs a training run from its first process to its summary, anew or from where it stopped."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import ray

from deploy.check import RunPlan, check_run
from deploy.checkpoints import last_checkpoint, remove_unnamed
from deploy.coordinator_line import CoordinatorLine
from deploy.learner_group import RayTrainGroup
from deploy.learner_watch import LearnerWatch, Size
from deploy.metrics.boards import check_wandb
from deploy.metrics.endpoint import check_port
from deploy.metrics.run import RunMetrics
from deploy.nodes import Nodes
from deploy.placement import check_learners, reserve
from deploy.processes import RayProcesses
from deploy.progress import Progress, Silent
from deploy.put_back import begin_storage, check_unused
from deploy.roles import generation_counts
from deploy.run_dir import RunDir, create_run_dir, find_run, write_json
from deploy.run_state import RunState, claim, read_state, release
from deploy.seen import check_seen_everywhere
from deploy.start import log_directory, start_ray
from deploy.summary import summarize
from deploy.supervisor import Supervisor
from deploy.watch import Watch
from distrl.config import Config, load_config
from distrl.errors import RefusedError

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
    check_unused(config)
    run_dir = create_run_dir(config)
    begin_storage(config, run_dir)
    return _run(config, plan, run_dir, progress or Silent())


def resumable(path: Path) -> tuple[Config, RunDir, str | None]:
    """What is needed to go on with a run: its config, its directory, and the checkpoint that its ledger names last.

    Raises:
        ConfigError: its config cannot be used as it is; see `unfinished` for the others.
    """
    run_dir, checkpoint = unfinished(path)
    return load_config(run_dir.config), run_dir, checkpoint


def unfinished(path: Path) -> tuple[RunDir, str | None]:
    """A run that can be gone on with, and the checkpoint that its ledger names last.

    Without a checkpoint it goes on from the weights that it began with, and what was sampled stays.

    Raises:
        RefusedError: there is no such run, or it is running or finished. RunError: the checkpoint is damaged.
    """
    run_dir = find_run(path)
    state = read_state(run_dir)
    if state == RunState.RUNNING:
        raise RefusedError(f"{path}: the run must not be running to be resumed; stop it with: distrl stop {path}")
    if state == RunState.FINISHED:
        raise RefusedError(
            f"{path}: the run must have steps left to be resumed, it has done all of them; start a new one"
        )
    return run_dir, last_checkpoint(run_dir)


def resume_training(path: Path, progress: Progress | None = None, config: Config | None = None) -> dict[str, Any]:
    """Goes on with a run that was stopped, from its last checkpoint; see `run_training`.

    Args:
        config: the run's own with the secrets that its directory does not keep; None reads the directory's.
    Raises:
        RefusedError: it cannot be resumed (see `resumable`). RunError: it failed.
    """
    run_dir, _ = unfinished(path)
    config = load_config(run_dir.config) if config is None else config
    return _run(config, check_run(config), run_dir, progress or Silent())


def _run(config: Config, plan: RunPlan, run_dir: RunDir, progress: Progress) -> dict[str, Any]:
    began = time.time()
    lock = claim(run_dir)
    outcome = RunState.FAILED
    try:
        remove_unnamed(run_dir)
        with progress, RunMetrics(config, run_dir) as metrics:
            progress.phase("starting Ray")
            own_ray = start_ray()
            try:
                check_seen_everywhere(config, run_dir)
                snapshot = _run_actors(config, plan, run_dir, progress, metrics)
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
    config: Config, plan: RunPlan, run_dir: RunDir, progress: Progress, metrics: RunMetrics
) -> dict[str, Any]:
    """Starts actors and learner, watches them until the run is done or stopped, and ends them; the last snapshot."""
    progress.phase("starting actors and learner")
    reservation = reserve(config, plan)
    processes = RayProcesses(config, run_dir, plan, reservation)
    line = CoordinatorLine(processes.coordinator)
    supervisor = Supervisor(processes, line.tell, wanted(config, plan), config.limits)
    group = RayTrainGroup(config, run_dir, processes.coordinator, processes.store)
    learners = LearnerWatch(
        group, line.tell, supervisor.learner_left, supervisor.learner_failed, Size.of(config.train), config.train.steps
    )
    learners.start(Nodes().look())
    check = partial(check_learners, config, plan)
    try:
        return Watch(config, run_dir, supervisor, line, learners, progress, metrics, check).until_the_end()
    finally:
        # A learner that still waits for a batch gets an error for it, so that its group ends before Ray does.
        processes.coordinator.abort.remote("the run has ended")
        group.stop(timeout_s=STOP_S)
        for process in supervisor.processes():
            processes.end(process.handle)
        reservation.release()


def wanted(config: Config, plan: RunPlan) -> dict[str, int]:
    """Processes of each stage."""
    counts = generation_counts(config, plan.samples)
    if config.samples:
        counts["grading"] = config.grading.actors
    if plan.scores_reference:
        counts["reference"] = config.reference.actors
    if config.replay.journal is not None:
        counts["replay"] = 1
    return counts
