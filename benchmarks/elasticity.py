"""How long does the learner stand still when the number of its workers changes?

    python -m benchmarks.elasticity

A small run on Ray nodes of this machine; its learner is elastic, with one worker per node. Each event once, one after
the other: a request for another number of workers (`distrl scale`), a node that joins, one that is announced to go
(`ray drain-node`), a worker that is killed, a node that is killed. `until_s`: from the request, or the moment at which
it happened, to the end of the first optimizer step of the next group; `gap_s`: the longest time between the ends of two
optimizer steps on the way there, which is how long no step was made.

Prints a JSON line per event.
"""

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from deploy.scaling import scale_run
from tests.system.nodes import NODE, WAIT_S, Driven, driven, one_node_cluster
from tests.system.test_resize import wait_until


def measure(run: Driven, workers: int, happen: Callable[[], object]) -> dict[str, Any]:
    """Lets something happen and waits for the first step of a group of so many workers that begins after it."""
    groups = len(run.groups())
    event_s = time.time()
    happen()
    wait_until(lambda: len(run.groups()) > groups and run.groups()[-1][1] == workers, WAIT_S)
    began_s = run.groups()[-1][0]
    wait_until(lambda: any(t > began_s for t in run.stepped()), WAIT_S)
    times = run.stepped()
    first_s = min(t for t in times if t > began_s)
    last_before = max((t for t in times if t <= event_s), default=event_s)
    way = [last_before, *(t for t in times if event_s < t <= first_s)]
    gap_s = max(later - earlier for earlier, later in pairwise(way))
    return {"until_s": round(first_s - event_s, 2), "gap_s": round(gap_s, 2)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, one_node_cluster() as cluster, driven(Path(folder), cluster) as run:
        run.trains_on()

        def show(event: str, workers: int, happen: Callable[[], object]) -> None:
            print(json.dumps({"event": event, "workers": workers, **measure(run, workers, happen)}), flush=True)
            run.trains_on()

        nodes: list[Any] = []
        show("node joins", 2, lambda: nodes.append(cluster.add_node(**NODE)))
        show("request for 1", 1, lambda: scale_run(run.path, {"learners": 1}, WAIT_S))
        show("request for 2", 2, lambda: scale_run(run.path, {"learners": 2}, WAIT_S))
        show("worker killed", 2, lambda: os.kill(run.rows("learner")[-1]["pid"], signal.SIGKILL))
        gcs = GcsClient(address=cluster.address)
        preemption = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        show("node announced", 1, lambda: gcs.drain_node(nodes[0].node_id, preemption, "it goes", 0))
        cluster.remove_node(nodes[0])
        show("node joins", 2, lambda: nodes.append(cluster.add_node(**NODE)))
        show("node killed", 1, lambda: cluster.remove_node(nodes[1], allow_graceful=False))


if __name__ == "__main__":
    main()
