"""A day of a run, real coordinator and stages over a fake engine and a virtual clock: nothing of it grows."""

import asyncio
import gc
import random
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from torch import Tensor

from deploy.metrics.exporter import Exporter
from deploy.metrics.history import readings
from distrl.messages import BatchGrant, StepReport
from distrl.sampling import LoadReport, Sample, SampleRequest
from tests.metrics.snapshots import METRICS
from tests.simulation.loop import VirtualLoop
from tests.simulation.run import undisturbed
from tests.simulation.schedule import schedule_of
from tests.simulation.world import Disk, Faults, WeightEngine, World

DAY_S = 86_400.0
TRAIN_S = 480.0
"""Seconds of an optimizer step."""
LOOK_S = 60.0
"""Seconds between two looks of the driver."""
GROWTH_BYTES_PER_STEP = 500
"""Less than one of a step's records takes, or one of its tickets; a number in the tree of versions may stay."""

LONG = replace(
    undisturbed(schedule_of(0)),
    steps=100_000,
    tickets_per_step=2,
    max_staleness=1,
    on_stale="wait",
    actors=2,
    checkpoint_every=10,
    evaluate_every=20,
    reference=True,
    slow_actor=-1,
    poison_actor=1,
    # One prompt in sixteen cannot be graded: it is retried, and dropped with its reason.
    poison_tickets=tuple(range(0, 4096, 16)),
)


class ForgettingEngine(WeightEngine):
    """Without the fake engine's own memory of what it was asked, which is for other tests."""

    async def sample(self, request: SampleRequest) -> list[Sample]:
        try:
            return await super().sample(request)
        finally:
            self.requests.clear()

    async def load(self, version: int, tensors: Mapping[str, Tensor], *, changed_only: bool = False) -> LoadReport:
        report = await super().load(version, tensors, changed_only=changed_only)
        self.loads.clear()
        self._weights = {version: self._weights[version]}
        return report


class Day:
    """A learner that takes its time, and a driver that looks and exports."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._exporter = Exporter(registry := CollectorRegistry(), LONG.steps)
        self._registry = registry
        self._seen = -1
        self.measured: list[tuple[int, int, int]] = []
        """(steps, series, bytes) whenever asked for."""

    async def learn(self) -> None:
        world, step, weight = self._world, 0, 0
        while True:
            grant = await world.coordinator.next_batch(step + 1)
            assert isinstance(grant, BatchGrant)
            await asyncio.sleep(TRAIN_S)
            step = grant.step
            ages = {t.ticket_id: t.staleness for t in grant.tickets}
            version = await world.coordinator.trained(StepReport(step, 1.0, TRAIN_S, 0.0, METRICS), ages)
            weight += 1
            await world._publish(version, step, weight)
            if step % LONG.checkpoint_every == 0:
                await world.coordinator.commit_checkpoint(f"step-{step}", step, version, "0" * 64)

    async def watch(self) -> None:
        while True:
            snapshot = await self._world.coordinator.snapshot(self._seen)
            assert snapshot["failed"] is None
            if snapshot["records"]:
                self._seen = snapshot["records"][-1]["number"]
            self._exporter.update({**snapshot, "restarts": {"generation": 0}})
            self._step = snapshot["step"]
            await asyncio.sleep(LOOK_S)

    def measure(self) -> None:
        gc.collect()
        self.measured.append((self._step, len(readings(self._registry)), tracemalloc.get_traced_memory()[0]))

    def value(self, metric: str, labels: str = "") -> float:
        return {(name, on): value for name, on, value in readings(self._registry)}[metric, labels]


def test_a_day_of_a_run_leaves_memory_and_the_number_of_series_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.simulation.loop.MOST_TURNS", 10**9)
    monkeypatch.setattr("tests.simulation.world.WeightEngine", ForgettingEngine)
    monkeypatch.setattr("actors.recorder.KEPT", 64)  # full long before the first look at memory
    loop = VirtualLoop(rng := random.Random(0))
    (tmp_path / "run").mkdir()

    async def scenario() -> Day:
        world = World(LONG, Disk(tmp_path / "run"), Faults(()), rng)
        world.begin()
        await world.coordinator.start()
        day = Day(world)
        tasks = [world.spawn(day.learn()), world.spawn(day.watch())]
        tracemalloc.start()
        for until in (DAY_S / 4, DAY_S):
            await asyncio.wait([*tasks, world.spawn(asyncio.sleep(until - loop.time()))], return_when="FIRST_COMPLETED")
            for task in tasks:
                assert not task.done(), task.exception()
            day.measure()
        tracemalloc.stop()
        return day

    try:
        day = loop.run_until_complete(scenario())
    finally:
        loop.end()
    (early_steps, early_series, early_bytes), (steps, series, used) = day.measured
    assert steps > 0.8 * DAY_S / TRAIN_S
    assert day.value("distrl_dropped_tickets_total", "reason=grading_failed") > steps / 16
    assert day.value("distrl_retries_total", "stage=generation") > steps / 16
    assert series == early_series < 150
    assert used - early_bytes < GROWTH_BYTES_PER_STEP * (steps - early_steps)


def test_no_label_holds_what_a_run_has_more_of_every_day() -> None:
    """Labels are stages, actors, states, reasons, evaluations and names of metrics; never a prompt or a ticket."""
    from deploy.metrics.families import Families

    families: dict[str, Any] = vars(Families(CollectorRegistry()))
    found = {label for family in families.values() for label in getattr(family, "_labelnames", ())}
    allowed = {"stage", "state", "cause", "reason", "actor", "activity", "evaluation", "percentile", "metric"}
    assert found == allowed
