"""Wires a run together, watches it, and sums it up."""

import logging
import os
import time
from dataclasses import dataclass, field
from typing import Any

import ray

from deploy.check import RunPlan, check_run
from deploy.learner import RESOURCE, RayTrainGroup, train_environment
from deploy.progress import Progress, Silent
from deploy.remote.coordinator import CoordinatorActor
from deploy.remote.generation import GenerationActor
from deploy.remote.grading import GradingActor
from deploy.remote.journal import JournalActor
from deploy.remote.policy_store import PolicyStoreActor
from deploy.remote.reference import ReferenceActor
from deploy.run_dir import RunDir, create_run_dir, write_json
from deploy.stall import StallWatch
from deploy.summary import summarize
from distrl.config import Config
from distrl.errors import DeadlineError, RunError
from learners.group import GroupStatus

POLL_S = 0.2
STOP_S = 30.0
"""Seconds that the learner's processes get to end."""


@dataclass(slots=True)
class Handles:
    """The actors of a run."""

    stages: dict[str, list[Any]] = field(default_factory=dict)
    store: Any = None
    coordinator: Any = None

    def all(self) -> list[Any]:
        return [self.coordinator, self.store, *(h for members in self.stages.values() for h in members)]


def run_training(config: Config, progress: Progress | None = None) -> dict[str, Any]:
    """Trains as the config says and returns the summary, which is also in the run's `summary.json`.

    Raises:
        ConfigError, DataError: the config cannot be run.
        RunError: the run's directory exists, or the run failed; the message has the cause.
    """
    progress = progress or Silent()
    began = time.time()
    plan = check_run(config)
    run_dir = create_run_dir(config)
    with progress:
        progress.phase("starting Ray")
        own_ray = start_ray()
        try:
            snapshot = _run_actors(config, plan, run_dir, progress)
        except BaseException:
            progress.line(f"what the processes of the run wrote: {_log_directory()}")
            raise
        finally:
            if own_ray:
                ray.shutdown()
        summary = summarize(run_dir, snapshot, wall_s=time.time() - began)
        write_json(run_dir.summary, summary)
        progress.finish(summary, run_dir.path)
    return summary


def _run_actors(config: Config, plan: RunPlan, run_dir: RunDir, progress: Progress) -> dict[str, Any]:
    """Starts actors and learner, watches them until the run is done, and ends them; the last snapshot."""
    progress.phase("starting actors and learner")
    handles = start_actors(config, run_dir, plan)
    group = RayTrainGroup(config, run_dir, handles.coordinator, handles.store)
    group.start()
    try:
        _wait_for_actors(config, handles)
        progress.phase("evaluating the model before training")
        ray.get(handles.coordinator.start.remote(), timeout=config.limits.start_timeout_s)
        return _watch(config, handles, group, progress)
    finally:
        # A learner that still waits for a batch gets an error for it, so that its group ends before Ray does.
        handles.coordinator.stop.remote("the run has ended")
        group.stop(timeout_s=STOP_S)
        for handle in handles.all():
            ray.kill(handle)


def start_ray() -> bool:
    """Starts a local Ray unless this process is connected already; returns whether it did."""
    train_environment()
    if ray.is_initialized():
        return False
    # Our actors take no CPUs of Ray's: threads are set per process, and all processes must start at once.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    ray.init(
        address="local",
        log_to_driver=False,
        logging_level=logging.ERROR,
        include_dashboard=False,
        resources={RESOURCE: 1},
        namespace="distrl",
    )
    return True


def _log_directory() -> str:
    node = ray._private.worker.global_worker.node
    return "(Ray is not running)" if node is None else str(node.get_logs_dir_path())


def start_actors(config: Config, run_dir: RunDir, plan: RunPlan) -> Handles:
    """Creates all actors of a run at once; their constructors run in their own processes."""

    def create(actor: type, count: int, *arguments: Any) -> list[Any]:
        made: Any = ray.remote(actor).options(num_cpus=0, max_restarts=0, max_task_retries=0)
        return [made.remote(*arguments) for _ in range(count)]

    handles = Handles()
    (handles.store,) = create(PolicyStoreActor, 1)
    handles.stages["generation"] = [
        create(GenerationActor, 1, config, f"generation-{i}", handles.store)[0] for i in range(config.generation.actors)
    ]
    handles.stages["grading"] = create(GradingActor, config.grading.actors, config, plan.grader)
    handles.stages["reference"] = (
        create(ReferenceActor, config.reference.actors, config) if plan.scores_reference else []
    )
    handles.stages["journal"] = create(JournalActor, 1, run_dir)
    (handles.coordinator,) = create(CoordinatorActor, 1, config, run_dir, handles.stages)
    return handles


def _wait_for_actors(config: Config, handles: Handles) -> None:
    """Returns when every actor's constructor is done.

    Raises:
        RunError: one failed; DeadlineError: one is not up within limits.start_timeout_s. Both name it.
    """
    named = {"coordinator": handles.coordinator, "policy-store": handles.store}
    for stage, members in handles.stages.items():
        named |= {f"{stage}-{i}": handle for i, handle in enumerate(members)}
    deadline = time.monotonic() + config.limits.start_timeout_s
    for name, handle in named.items():
        try:
            ray.get(handle.__ray_ready__.remote(), timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            raise DeadlineError(
                f"{name} must be up within limits.start_timeout_s = {config.limits.start_timeout_s:g} s"
            ) from None
        except ray.exceptions.RayActorError as error:
            raise RunError(f"{name} could not start: {_constructor_error(error)}") from error


def _constructor_error(error: BaseException) -> str:
    """The last line of the traceback that Ray puts into the message is the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _watch(config: Config, handles: Handles, group: RayTrainGroup, progress: Progress) -> dict[str, Any]:
    """Shows the run's progress until it is done; raises what ended it."""
    seen = -1
    stall = StallWatch(config.limits.stall_warning_s)
    while True:
        try:
            snapshot: dict[str, Any] = ray.get(
                handles.coordinator.snapshot.remote(seen), timeout=config.limits.publish_timeout_s
            )
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise RunError(f"the coordinator does not answer: {type(error).__name__}") from error
        if snapshot["records"]:
            seen = snapshot["records"][-1]["number"]
        progress.update(snapshot)
        if warning := stall.look(snapshot, time.monotonic()):
            progress.line(warning)
        if snapshot["failed"]:
            raise RunError(snapshot["failed"])
        if group.status() == GroupStatus.FAILED:
            raise group.error() or RunError("the learner failed")
        if snapshot["done"] and group.status() == GroupStatus.FINISHED:
            return snapshot  # the learner has committed its last checkpoint
        time.sleep(POLL_S)
