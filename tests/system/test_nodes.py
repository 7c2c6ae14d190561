"""A second Ray node joins a run, is announced to go, joins again and is killed: two raylets on this machine."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from deploy.audit import audit_run
from deploy.scaling import scale_run
from tests.system.nodes import NODE, WAIT_S, Driven, one_node_cluster, wait_until
from tests.system.test_resize import TICKETS, records

pytestmark = pytest.mark.ray


@pytest.fixture(name="cluster", scope="module")
def one_node() -> Iterator[Cluster]:
    with one_node_cluster() as cluster:
        yield cluster


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


def test_a_node_joins_and_leaves_announced_and_one_joins_and_dies(cluster: Cluster, tmp_path: Path) -> None:
    run = Driven(tmp_path, cluster, learners=(1, 2))
    try:
        _play(cluster, run)
        assert run.driver.wait(WAIT_S) == 0
    except BaseException:
        print(run.said())
        raise
    finally:
        run.end()
    found = audit_run(run.path)
    assert found.violations == ()
    assert found.drops == {}
    steps = [r["step"] for r in records(run.path, "step")]
    again = [step for step in set(steps) if steps.count(step) > 1]
    assert set(steps) == set(range(1, found.committed_steps + 1))
    # Steps since the checkpoint only, which is made every second step and named one or two steps later.
    assert len(again) <= 4
    assert found.tickets["committed"] == TICKETS * found.committed_steps


def _play(cluster: Cluster, run: Driven) -> None:
    wait_until(run.learners(1), WAIT_S)
    run.trains_on()

    announced = joins(cluster, run)
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
    assert records(run.path, "vacated") != []

    killed = joins(cluster, run)
    assert records(run.path, "rolled_back") == []  # it joined without a step being lost
    cluster.remove_node(killed, allow_graceful=False)
    wait_until(lambda: bool(records(run.path, "rolled_back")), WAIT_S)
    wait_until(run.learners(1), WAIT_S)
    run.trains_on()
    run.run_dir.stop_request.touch()
