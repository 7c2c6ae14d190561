"""Starts Ray."""

import logging
import os

import ray

from deploy.ray_train import RESOURCE, train_environment


def start_ray(pretend_gpus: int | None = None) -> bool:
    """Connects to the Ray that RAY_ADDRESS names, else starts a local one; returns whether it did either.

    A process that is connected already stays so.

    Args:
        pretend_gpus: GPUs that Ray shall count, whatever is there; for tests of the scheduling.
    """
    train_environment()
    if ray.is_initialized():
        return False
    # Our actors take no CPUs of Ray's: threads are set per process, and all processes must start at once.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    if address := os.environ.get("RAY_ADDRESS"):
        # A cluster that somebody else started, as KubeRay does: its nodes have the resources, and it goes on after us.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="distrl")
        return True
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
