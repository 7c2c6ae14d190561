"""A run on several Ray nodes of this machine, as a process of its own, for tests and benchmarks.

python -m tests.system.nodes      # nodes join, are announced to go, are killed
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from deploy.audit import audit_run
from deploy.process_table import read_processes
from deploy.ray_train import RESOURCE, train_environment
from deploy.run_dir import RunDir
from deploy.scaling import scale_run
from distrl.audit import Audit
from distrl.config import dump_config
from tests.system.test_resize import TICKETS, config, records, tiny_model, wait_until

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


def joins(cluster: Cluster, run: Driven) -> Any:
    """Another node with a learner worker and a grading actor on it."""
    node = cluster.add_node(**NODE)
    wait_until(run.learners(2), WAIT_S)
    more = len(run.rows("grading"))
    while node.node_id not in {r["node"] for r in run.rows("grading")}:  # Ray says where
        more += 2
        scale_run(run.path, {"grading": more}, WAIT_S)
    run.trains_on()
    return node


def announced_node(cluster: Cluster, run: Driven) -> None:
    """A node joins, is announced to go, and goes: no step is lost and no process replaced."""
    wait_until(run.learners(1), WAIT_S)
    run.trains_on()

    announced = joins(cluster, run)
    vacated = len(records(run.path, "vacated"))
    goes_ms = int((time.time() + 60) * 1000)
    preemption = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, cause = GcsClient(address=cluster.address).drain_node(announced.node_id, preemption, "it goes", goes_ms)
    assert accepted, cause
    wait_until(lambda: announced.node_id not in run.places(), WAIT_S)
    wait_until(run.learners(1), WAIT_S)
    cluster.remove_node(announced)
    run.trains_on()
    # Everything that was there had left before the node went: nothing was lost, and nobody replaced.
    assert records(run.path, "rolled_back") == []
    assert records(run.path, "restarted") == []
    assert len(records(run.path, "vacated")) > vacated


def killed_node(cluster: Cluster, run: Driven) -> None:
    """A node joins without a step being lost, and is killed: the steps since the checkpoint are made again."""
    before = len(records(run.path, "rolled_back"))
    killed = joins(cluster, run)
    assert len(records(run.path, "rolled_back")) == before  # it joined without a step being lost
    cluster.remove_node(killed, allow_graceful=False)
    wait_until(lambda: len(records(run.path, "rolled_back")) > before, WAIT_S)
    wait_until(run.learners(1), WAIT_S)
    run.trains_on()


def judge(run: Driven) -> Audit:
    """Stops the run and looks at what is left."""
    run.run_dir.stop_request.touch()
    assert run.driver.wait(WAIT_S) == 0
    found = audit_run(run.path)
    assert found.violations == (), found.violations
    assert found.drops == {}
    assert found.tickets["committed"] == TICKETS * found.committed_steps
    steps = [r["step"] for r in records(run.path, "step")]
    assert set(steps) >= set(range(1, found.committed_steps + 1))
    # Steps since the checkpoint only, which is made every second step and named one or two steps later.
    again = sum(steps.count(step) - 1 for step in set(steps))
    assert again <= 4 * len(records(run.path, "rolled_back"))
    return found


@contextmanager
def driven(folder: Path, cluster: Cluster) -> Iterator[Driven]:
    """A run of its own; what it has written is shown where something fails."""
    run = Driven(folder, cluster, learners=(1, 2))
    try:
        yield run
    except BaseException:
        print(run.said())
        raise
    finally:
        run.end()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, one_node_cluster() as cluster, driven(Path(folder), cluster) as run:
        for _ in range(2):
            announced_node(cluster, run)
        for _ in range(2):
            killed_node(cluster, run)
        found = judge(run)
        print(json.dumps({"steps": found.committed_steps, "tickets": found.tickets, "returned": dict(found.returned)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
