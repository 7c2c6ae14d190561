"""What Ray Train is told: its settings, the resource that its workers take, and the function that they run.

Apart from `deploy.learner`, which takes a second to import: only the workers need it.
"""

import os
from collections.abc import Mapping
from typing import Any

RESOURCE = "distrl_learner"
"""A resource of their own: Ray Train counts a node's total CPUs, not the free ones."""


def train_environment() -> None:
    """Settings that Ray Train reads from the environment; must be set before it is imported."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # A group leaves a node that is about to go because the driver asks it to.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def worker_main(arguments: Mapping[str, Any]) -> None:
    """See `deploy.learner.run_worker`."""
    from deploy.learner import run_worker

    run_worker(arguments)
