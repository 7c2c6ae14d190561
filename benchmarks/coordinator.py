"""What does a ticket cost in the coordinator and the ledger?

    python -m benchmarks.coordinator [--actors 10 100 1000] [--repetitions 3] [--tickets 6000] [--group-size 16]

The real coordinator, pipeline, pools and ledger (SQLite on disk) in one process, with stages that answer at once: a
fake actor returns its receipt after the event loop has turned once. A learner takes batch after batch and publishes.
Every actor samples one ticket at a time and the batch has half as many tickets as there are actors, so that all of
them can be busy within the staleness bound of 2. Nothing else runs, so the process time over the tickets is what one
ticket costs. The sizes alternate over the repetitions, medians count. Wanted: at least 5,000 rollouts a second, and a
cost that grows by less than 1.5 times from 10 to 1,000 actors.

Prints a JSON line per run and one with the ratios.
"""

import argparse
import asyncio
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from actors.calls import LocalRef
from actors.coordinator import Coordinator
from actors.pipeline import Pipeline, PipelineLimits
from actors.pool import Pool
from actors.recorder import Recorder
from actors.settings import CoordinatorSettings, Prompts
from actors.updates import UpdateLimits
from distrl.ledger import Ledger
from distrl.messages import BatchGrant, GenerationReceipt, GradingReceipt, JournalReceipt, LoadReceipt, StepReport
from distrl.staleness import Admission
from distrl.tasks.problem import Problem

STALENESS = 2
NOTHING = LocalRef(None)


class InstantStage:
    """A caller whose actor answers every call after one turn of the event loop."""

    def __init__(self, name: str, group_size: int) -> None:
        self.name = name
        self._group_size = group_size
        self._version = 0
        self._files = 0

    async def batch(self, method: str, *args: Any, timeout_s: float) -> tuple[Any, Any]:
        await asyncio.sleep(0)
        n = self._group_size
        if method == "generate":
            version = self._version
            receipt = GenerationReceipt(
                ticket_id=args[0].ticket_id,
                rollouts=n,
                response_tokens=8 * n,
                truncated=0,
                versions=(version,),
                bytes=1000,
                started_s=0.0,
                finished_s=0.0,
            )
            return receipt, NOTHING
        tickets = len(args) - 1
        graded = GradingReceipt(
            reward_sums=(n / 2,) * tickets,
            correct=(n // 2,) * tickets,
            rollouts=(n,) * tickets,
            components=({},) * tickets,
            failures=(None,) * tickets,
            bytes=1000,
            started_s=0.0,
            finished_s=0.0,
        )
        return graded, NOTHING

    async def ask(self, method: str, *args: Any, timeout_s: float) -> Any:
        await asyncio.sleep(0)
        if method == "pull":
            self._version = args[0]
            return LoadReceipt(args[0], 0.0, 0.0, 0)
        self._files += 1
        return JournalReceipt(f"{self._files}.arrow", "0" * 64, self._group_size, 1000)


async def run(directory: Path, actors: int, tickets: int, group_size: int) -> dict[str, Any]:
    """One run over at least `tickets` tickets; returns what a ticket costs."""
    per_step = max(1, actors // 2)
    steps = -(-tickets // per_step)
    generation, grading = Pool("generation"), Pool("grading")
    for i in range(actors):
        generation.add(InstantStage(f"generation-{i}", group_size), group_size)
    for i in range(max(1, actors // 10)):
        grading.add(InstantStage(f"grading-{i}", group_size), 8)
    limits = PipelineLimits(2, 0.0, 60, 60, 60, 60, 60, 4, 4)
    pipeline = Pipeline(generation, grading, None, InstantStage("journal", group_size), limits, time.time)
    settings = CoordinatorSettings(
        seed=0,
        steps=steps,
        group_size=group_size,
        admission=Admission(STALENESS, per_step),
        on_stale="wait",
        updates=UpdateLimits(attempts=2, retry_delay_s=0.0, sync_timeout_s=60, publish_timeout_s=60),
        ready_bytes=1 << 40,
        drops_in_a_row=8,
        evaluate_every_steps=0,
        keep_checkpoints=2,
        redraws=3,
    )
    ledger = Ledger(directory / "ledger.sqlite")
    heldout = [Problem.of("0", "0")]
    prompts = Prompts(lambda ticket_id: Problem.of(str(ticket_id), "0"), heldout, heldout)
    recorder = Recorder(directory / "metrics.jsonl", time.time)
    coordinator = Coordinator(settings, ledger, prompts, pipeline, recorder, time.time)
    began, began_cpu = time.perf_counter(), time.process_time()
    await coordinator.start()
    for step in range(1, steps + 1):
        grant = await coordinator.next_batch(step)
        assert isinstance(grant, BatchGrant)
        report = StepReport(step, 0.0, 0.0, 0.0, {"loss": 0.0})
        version = await coordinator.trained(report, {t.ticket_id: t.staleness for t in grant.tickets})
        await coordinator.published(version, step, "0" * 64)
    took, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    await coordinator.done.wait()
    trained = steps * per_step
    ledger.close()
    recorder.close()
    return {
        "actors": actors,
        "tickets": trained,
        "rollouts_per_s": trained * group_size / took,
        "cpu_us_per_ticket": 1e6 * cpu / trained,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--tickets", type=int, default=6000)
    parser.add_argument("--group-size", type=int, default=16)
    arguments = parser.parse_args()
    results: dict[int, list[dict[str, Any]]] = {n: [] for n in arguments.actors}
    for repetition in range(arguments.repetitions):
        for actors in arguments.actors:
            gc.collect()
            with tempfile.TemporaryDirectory() as directory:
                result = asyncio.run(run(Path(directory), actors, arguments.tickets, arguments.group_size))
            results[actors].append(result)
            print(json.dumps({"repetition": repetition, **result}), flush=True)
    cost = {n: statistics.median(r["cpu_us_per_ticket"] for r in rs) for n, rs in results.items()}
    rate = {n: statistics.median(r["rollouts_per_s"] for r in rs) for n, rs in results.items()}
    fewest, most = min(cost), max(cost)
    print(
        json.dumps(
            {
                "actors": [fewest, most],
                "slowest_rollouts_per_s": min(rate.values()),
                "cost_of_most_over_fewest": cost[most] / cost[fewest],
            }
        )
    )


if __name__ == "__main__":
    main()
