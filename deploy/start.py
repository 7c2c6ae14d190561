"""Starts Ray."""

import logging
import os

import ray

from deploy.learner import RESOURCE, train_environment


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
