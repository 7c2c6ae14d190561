"""Starts Ray and the actors of a run."""

import logging
import os
import time
from dataclasses import dataclass, field
from typing import Any

import ray

from deploy.check import RunPlan, generation_actors, weights_by_role
from deploy.learner import RESOURCE, train_environment
from deploy.placement import Reservation
from deploy.remote.coordinator import GENERATION_STAGES, CoordinatorActor
from deploy.remote.environment import EnvironmentActor
from deploy.remote.generation import GenerationActor
from deploy.remote.grading import GradingActor
from deploy.remote.journal import JournalActor
from deploy.remote.policy_store import PolicyStoreActor
from deploy.remote.reference import ReferenceActor
from deploy.run_dir import RunDir
from distrl.config import Config
from distrl.errors import DeadlineError, RunError


@dataclass(slots=True)
class Handles:
    """The actors of a run."""

    stages: dict[str, list[Any]] = field(default_factory=dict)
    store: Any = None
    coordinator: Any = None

    def all(self) -> list[Any]:
        return [self.coordinator, self.store, *(h for members in self.stages.values() for h in members)]


def start_ray(pretend_gpus: int | None = None) -> bool:
    """Starts a local Ray unless this process is connected already; returns whether it did.

    Args:
        pretend_gpus: GPUs that Ray shall count, whatever is there; for tests of the scheduling.
    """
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
        num_gpus=pretend_gpus,
        # Only for learners, which do not count CPUs; as many as anybody may ask for.
        resources={RESOURCE: 1024},
        namespace="distrl",
    )
    return True


def log_directory() -> str:
    node = ray._private.worker.global_worker.node
    return "(Ray is not running)" if node is None else str(node.get_logs_dir_path())


def start_actors(config: Config, run_dir: RunDir, plan: RunPlan, reservation: Reservation) -> Handles:
    """Creates all actors of a run at once; their constructors run in their own processes."""

    def create(actor: type, count: int, *arguments: Any, max_restarts: int = 0, **options: Any) -> list[Any]:
        made: Any = ray.remote(actor).options(num_cpus=0, max_restarts=max_restarts, max_task_retries=0, **options)
        return [made.remote(*arguments) for _ in range(count)]

    handles = Handles()
    # A restarted store is empty, and filled again by the learner: see actors.updates.
    (handles.store,) = create(PolicyStoreActor, 1, max_restarts=-1)
    # A restarted environment actor has no episodes; those that it had are sampled again.
    environments = []
    if config.environment.name is not None:
        actors = config.environment.actors
        environments = create(EnvironmentActor, actors, config, os.getcwd(), max_restarts=-1)
        handles.stages["environment"] = environments
    counts = generation_actors(config, plan.samples)
    for role, weights in weights_by_role(config, plan.samples).items():
        stage = GENERATION_STAGES[role]
        options = reservation.options(stage)
        handles.stages[stage] = [
            create(GenerationActor, 1, config, f"{stage}-{i}", handles.store, weights, environments, **options)[0]
            for i in range(counts[role])
        ]
    handles.stages["grading"] = create(GradingActor, config.grading.actors, config, plan.graders, os.getcwd())
    handles.stages["reference"] = (
        create(ReferenceActor, config.reference.actors, config) if plan.scores_reference else []
    )
    handles.stages["journal"] = create(JournalActor, 1, run_dir)
    left_out = plan.left_out | plan.values.unsolved
    (handles.coordinator,) = create(CoordinatorActor, 1, config, run_dir, handles.stages, left_out, plan.samples)
    return handles


def wait_for_actors(config: Config, handles: Handles) -> None:
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
