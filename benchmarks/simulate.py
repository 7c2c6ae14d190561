"""Would a run be held up by something that does not grow with the GPUs? A model, and a simulation that checks it.

    python -m benchmarks.simulate [--steps 12]

Measures on this machine what a ticket costs the coordinator with 1,000 actors, and how fast one process prepares
weights for publication and writes rollouts to the journal. Then, for clusters of 8, 256 and 10,000 GPUs, prints the
tickets per second that each part could do (`benchmarks.scale_model`), which part is the first bottleneck, and what a
discrete-event simulation of the whole says: tickets with random lengths that compete for slots, one coordinator, the
journal's processes, admission by staleness, and a learner that publishes. The `lifted` form of a cluster has the design
that lifts its first bottleneck.

`simulated_over_model` is the simulated rate over the smallest bound, from the third step on: near 1 where one part is
far behind the others, less where several are close to each other, never above 1 by more than the noise of the lengths.
"""

import argparse
import asyncio
import json
import math
import random
import tempfile
import time
from collections.abc import Generator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import simpy
import torch

from actors.journal import Journal
from benchmarks.coordinator import run as run_coordinator
from benchmarks.data_plane import ticket
from benchmarks.scale_model import Cluster, Costs, bounds
from distrl.manifest import cut, describe, lay_out
from distrl.rollouts import join

# GPUs are divided so that generation and learning are about equally fast.
CLUSTERS = (
    Cluster("8 GPUs, 1.5B", 8, 6, 1, 1.5e9, 28_672, 256, 1000, 0.6, 8, 128, 2),
    Cluster("256 GPUs, 8B", 256, 128, 1, 8e9, 131_072, 128, 4000, 0.6, 16, 512, 2),
    Cluster("10,000 GPUs, 70B", 10_000, 5_760, 8, 70e9, 327_680, 128, 8000, 0.6, 16, 4096, 2),
)
WARMING_STEPS = 2
CHUNK_BYTES = 64 << 20


def measured() -> Costs:
    """The costs of this machine, each from a few seconds of work."""
    with tempfile.TemporaryDirectory() as directory:
        found = asyncio.run(run_coordinator(Path(directory), 1000, 4000, 16))
    rows = [ticket(i, 16, 1024, np.random.default_rng(i)) for i in range(32)]
    size = sum(join(*one).nbytes for one in rows)
    with tempfile.TemporaryDirectory() as directory:
        journal_s = asyncio.run(_journal(Path(directory), rows))
    tensors = {str(i): torch.rand(4 << 20) for i in range(16)}
    began = time.perf_counter()
    manifest = describe(tensors, version=1, step=1)
    for _ in cut(tensors, lay_out(manifest.tensors, CHUNK_BYTES)):
        pass
    publish_s = time.perf_counter() - began
    return Costs(
        ticket_s=found["cpu_us_per_ticket"] / 1e6,
        publish_bytes_per_s=sum(entry.bytes for entry in manifest.tensors) / publish_s,
        journal_bytes_per_s=size / journal_s,
        bytes_per_token=size / (32 * 16 * 1024),
    )


async def _journal(directory: Path, rows: list[Any]) -> float:
    journal = Journal(directory)
    began = time.perf_counter()
    append: Any = journal.append
    await asyncio.gather(*(append(*one) for one in rows))
    return time.perf_counter() - began


class Simulation:
    """A run as events: what waits for what, and for how long."""

    def __init__(self, cluster: Cluster, costs: Costs, steps: int, seed: int = 0) -> None:
        self.cluster, self.costs, self.steps = cluster, costs, steps
        self._rng = random.Random(seed)
        self._env = simpy.Environment()
        self._coordinator = simpy.Resource(self._env)
        self._journal = simpy.Resource(self._env, cluster.journals)
        # Every replica's slots sample at the same speed.
        self._slots = [
            simpy.Container(self._env, capacity=cluster.slots, init=cluster.slots) for _ in range(cluster.replicas)
        ]
        self._ready = simpy.Container(self._env)
        self._next_replica = 0
        self.step_ends: list[float] = []

    def run(self) -> float:
        """Tickets a second, after the first steps."""
        learner = self._env.process(self._learn())
        for _ in range((self.cluster.max_staleness + 1) * self.cluster.tickets_per_step):
            self._env.process(self._ticket())
        self._env.run(until=learner)
        took = self.step_ends[-1] - self.step_ends[WARMING_STEPS - 1]
        return (self.steps - WARMING_STEPS) * self.cluster.tickets_per_step / took

    def _ticket(self) -> Generator[simpy.Event, Any, None]:
        yield from self._coordinated()
        slots = self._slots[self._next_replica]
        self._next_replica = (self._next_replica + 1) % len(self._slots)
        yield self._env.all_of([self._env.process(self._response(slots)) for _ in range(self.cluster.group)])
        yield from self._coordinated()
        with self._journal.request() as place:
            yield place
            yield self._env.timeout(self.cluster.journal_s(self.costs))
        yield from self._coordinated()
        yield self._ready.put(1)

    def _response(self, slots: simpy.Container) -> Generator[simpy.Event, Any, None]:
        yield slots.get(1)
        cluster = self.cluster
        tokens = cluster.mean_tokens * self._rng.lognormvariate(-(cluster.sigma**2) / 2, cluster.sigma)
        yield self._env.timeout(tokens * cluster.decode_step_s)
        yield slots.put(1)

    def _coordinated(self) -> Generator[simpy.Event, Any, None]:
        """A ticket passes the coordinator three times: issued, generated, ready."""
        with self._coordinator.request() as place:
            yield place
            yield self._env.timeout(self.costs.ticket_s / 3)

    def _learn(self) -> Generator[simpy.Event, Any, None]:
        cluster = self.cluster
        publication: simpy.Event = self._env.timeout(0)
        for _ in range(self.steps):
            yield self._ready.get(cluster.tickets_per_step)
            yield self._env.timeout(cluster.learn_s)
            yield publication
            yield self._env.timeout(cluster.copy_s)
            self.step_ends.append(self._env.now)
            publication = self._env.process(self._publish())

    def _publish(self) -> Generator[simpy.Event, Any, None]:
        """Beside the next step; what it releases may be issued when it has ended."""
        yield self._env.timeout(self.cluster.publish_s(self.costs))
        for _ in range(self.cluster.tickets_per_step):
            self._env.process(self._ticket())


def lifted(cluster: Cluster, costs: Costs) -> Cluster:
    """With as many publishers and journals as bring both below a tenth of the learner's step, and a staleness bound
    that leaves room for the longest responses."""
    step_s = cluster.learn_s
    publishers = min(cluster.learner_gpus, math.ceil(10 * cluster.publish_s(costs) / step_s))
    journals = math.ceil(10 * cluster.journal_s(costs) * cluster.tickets_per_step / step_s)
    made = replace(cluster, name=f"{cluster.name}, lifted", publishers=publishers, journals=journals)
    found = bounds(made, costs)
    wanted = 1.3 * min(rate for name, rate in found.items() if name != "staleness")
    most_stale = math.ceil((made.max_staleness + 0.5) * wanted / found["staleness"] - 0.5)
    return replace(made, max_staleness=max(made.max_staleness, most_stale))


def look(cluster: Cluster, costs: Costs, steps: int) -> dict[str, Any]:
    """What the model and the simulation say of a cluster."""
    found = bounds(cluster, costs)
    order = sorted((name for name in found if name != "learning alone"), key=found.__getitem__)
    simulated = Simulation(cluster, costs, steps).run()
    return {
        "cluster": cluster.name,
        "tickets_per_s": {name: round(rate, 3) for name, rate in found.items()},
        "first": order[0],
        "second": order[1],
        "publishers": cluster.publishers,
        "journals": cluster.journals,
        "max_staleness": cluster.max_staleness,
        "learn_s": round(cluster.learn_s, 3),
        "publish_s": round(cluster.publish_s(costs), 3),
        "of_what_the_gpus_could": round(found[order[0]] / min(found["generation"], found["learning alone"]), 3),
        "simulated_over_model": round(simulated / found[order[0]], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    costs = measured()
    print(json.dumps({"measured": asdict(costs)}), flush=True)
    for cluster in CLUSTERS:
        for one in (cluster, lifted(cluster, costs)):
            print(json.dumps(look(one, costs, arguments.steps)), flush=True)


if __name__ == "__main__":
    main()
