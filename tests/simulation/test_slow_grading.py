"""A grader that takes a hundred times as long slows a run as far as admission says, under a virtual clock."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from actors.grading import Grading
from actors.journal import FLUSH_S
from distrl.graders.grade import Grade
from distrl.tasks import Problem
from tests.simulation.loop import VirtualLoop
from tests.system.in_process import build, half_right

STEPS = 24
STEP_S = 0.1
"""What the learner takes for a step."""
TICKETS_PER_STEP = 2


class Slow:
    """Grades after a while; any number of tickets at the same time."""

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self.under_way = self.most = 0

    async def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(self._latency_s)
        self.under_way -= 1
        return list(half_right(problems, responses))

    def close(self) -> None:
        pass


def duration_s(directory: Path, latency_s: float, max_staleness: int) -> tuple[float, int]:
    """Virtual seconds of a run without evaluations, and the most tickets that were being graded at once."""
    grader = Slow(latency_s)
    loop = VirtualLoop(random.Random(0))

    async def play() -> float:
        system = build(directory, steps=STEPS, tickets_per_step=TICKETS_PER_STEP, max_staleness=max_staleness)
        for member in system.pipeline.grading.members:
            member.capacity = 64
            member.caller._worker = Grading("slow", grader, 64, clock=loop.time)  # type: ignore[attr-defined]
        began = loop.time()
        await system.coordinator.start()
        for step in range(1, STEPS + 1):
            grant = await system.coordinator.next_batch(step)
            await asyncio.sleep(STEP_S)
            await system.finish_step(grant)  # type: ignore[arg-type]
        return loop.time() - began

    try:
        return loop.run_until_complete(play()), grader.most
    finally:
        loop.end()


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_hundredfold_latency_costs_what_admission_lets_be_under_way(tmp_path: Path, max_staleness: int) -> None:
    """Admission lets `max_staleness` + 1 batches be under way: so many share one wait for the grader, and no step waits
    for anything else. Where the grader is quicker than the learner, nobody waits for it after the first batch."""
    latency_s = 0.05
    normal_s, _ = duration_s(tmp_path / "normal", latency_s, max_staleness)
    slow_s, most = duration_s(tmp_path / "slow", 100 * latency_s, max_staleness)
    window = max_staleness + 1
    waits = STEPS // window
    slow_wait_s = 100 * latency_s + FLUSH_S
    assert waits * slow_wait_s <= slow_s <= waits * (slow_wait_s + window * STEP_S) + 1e-6
    if max_staleness:
        assert normal_s <= STEPS * STEP_S + latency_s + FLUSH_S + 1e-6
    # One more is of the evaluation at the start.
    assert window * TICKETS_PER_STEP <= most <= window * TICKETS_PER_STEP + 1
