"""A run on several Ray nodes of this machine, as a process of its own, for tests and benchmarks."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from deploy.learner import RESOURCE, train_environment
from deploy.process_table import read_processes
from deploy.run_dir import RunDir
from distrl.config import dump_config
from tests.system.test_resize import config, records, tiny_model, wait_until

WAIT_S = 180.0
NODE = {"num_cpus": 2, "resources": {RESOURCE: 1}, "object_store_memory": 100 * 1024 * 1024}
"""What a node has: room for one learner worker."""


@contextmanager
def one_node_cluster() -> Iterator[Cluster]:
    """A cluster whose head is the only node; more are added and removed in the main thread only."""
    train_environment()
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    yield cluster
    for node in [*cluster.worker_nodes]:
        cluster.remove_node(node)
    cluster.remove_node(cluster.head_node)


class Driven:
    """The `distrl` command on a cluster, with an elastic learner.

    Args:
        learners: fewest and most workers.
    """

    def __init__(self, folder: Path, cluster: Cluster, learners: tuple[int, int]) -> None:
        fewest, most = learners
        changes = {"train.workers": fewest, "train.max_workers": most, "train.max_staleness": 2}
        settings = config(
            tiny_model(folder), folder, "nodes", **changes, **{"train.steps": 100_000, "limits.retry_delay_s": 0.2}
        )
        (folder / "config.yaml").write_text(dump_config(settings))
        self.run_dir = RunDir(settings.run_dir)
        self.path = settings.run_dir
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-c", "from deploy.cli import main; main()", "train", str(folder / "config.yaml")],
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "RAY_ADDRESS": cluster.address,
                    # A group that was started with too many workers, because Ray believed a dead node, fails after it.
                    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "25",
                },
            )

    def said(self) -> str:
        """The end of what the driver has written."""
        return self._log.read_text(errors="replace")[-4000:]

    def end(self) -> None:
        self.driver.kill()
        self.driver.wait()

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """Processes of a stage that are up."""
        return [r for r in read_processes(self.run_dir) if r["state"] == "up" and r["stage"] == stage]

    def places(self) -> set[str]:
        """Ray's ids of the nodes on which there is a process, whatever its state."""
        return {r["node"] for r in read_processes(self.run_dir) if "node" in r}

    def learners(self, count: int) -> Callable[[], bool]:
        return lambda: len(self.rows("learner")) == count

    def stepped(self) -> list[float]:
        """When optimizer steps ended, in seconds since the epoch."""
        return [r["time_s"] for r in records(self.path, "step")]

    def groups(self) -> list[tuple[float, int]]:
        """When the learner's groups began, and how many workers they had."""
        begun = [r for r in records(self.path, "learner") if "begins" in r["message"]]
        sizes = [re.search(r"the first of (\d+)", r["message"]) for r in begun]
        return [(r["time_s"], int(size[1]) if size else 1) for r, size in zip(begun, sizes, strict=True)]

    def trains_on(self) -> None:
        """Waits for the next optimizer steps."""
        done = len(self.stepped())

        def is_further() -> bool:
            assert self.driver.poll() is None, "the run ended"
            return len(self.stepped()) > done + 1

        wait_until(is_further, WAIT_S)


__all__ = ["NODE", "WAIT_S", "Driven", "one_node_cluster", "wait_until"]
