"""Grading: turns responses into rewards, in threads, so that a slow grader delays only what it grades."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray

from distrl.errors import StageError
from distrl.messages import GradingReceipt
from distrl.rewards import Grade, Grader
from distrl.schema import Stage, record_batch
from distrl.tasks.problem import Problem


class Grading:
    """Grades whole tickets with one grader.

    Args:
        grader_name: for the `grader` column.
        concurrency: tickets graded at the same time, each in a thread.
        clock: seconds since the epoch.
    """

    def __init__(
        self, grader_name: str, grader: Grader, concurrency: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._name = grader_name
        self._grader = grader
        self._clock = clock
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="grader")

    @ray.method(num_returns=2)
    async def grade(
        self, problems: Mapping[str, Problem], *batches: pa.RecordBatch
    ) -> tuple[GradingReceipt, pa.RecordBatch]:
        """Grades the rollouts of several tickets, one generation batch each.

        Args:
            problems: by prompt id, for every rollout of the batches.
        Raises:
            StageError: the grader failed; never a reward instead.
        """
        loop = asyncio.get_running_loop()
        started_s = self._clock()
        graded = await asyncio.gather(
            *(loop.run_in_executor(self._threads, self._grade_ticket, problems, batch) for batch in batches)
        )
        grades = [g for ticket in graded for g in ticket]
        finished_s = self._clock()
        columns: dict[str, Any] = {
            "rollout_id": [i for batch in batches for i in batch.column("rollout_id").to_pylist()],
            "reward": [g.reward for g in grades],
            "verdict": [g.verdict for g in grades],
            "reason": [g.reason for g in grades],
            "components": [list(g.components.items()) for g in grades],
            "grader": [self._name] * len(grades),
            "grading_started_s": [started_s] * len(grades),
            "grading_finished_s": [finished_s] * len(grades),
        }
        batch = record_batch(Stage.GRADING, columns)
        receipt = GradingReceipt(
            reward_sums=tuple(sum(g.reward for g in ticket) for ticket in graded),
            correct=tuple(sum(g.verdict == "correct" for g in ticket) for ticket in graded),
            rollouts=tuple(len(ticket) for ticket in graded),
            bytes=batch.nbytes,
            started_s=started_s,
            finished_s=finished_s,
        )
        return receipt, batch

    def _grade_ticket(self, problems: Mapping[str, Problem], batch: pa.RecordBatch) -> Sequence[Grade]:
        prompt_ids: list[str] = batch.column("prompt_id").to_pylist()
        texts: list[str] = batch.column("text").to_pylist()
        grades = self._grader([problems[p] for p in prompt_ids], texts)
        if len(grades) != len(texts):
            raise StageError(
                f"grader {self._name}: must return one grade per response ({len(texts)}), got {len(grades)}"
            )
        for prompt_id, grade in zip(prompt_ids, grades, strict=True):
            if grade.verdict == "failed":
                raise StageError(f"grader {self._name} failed on prompt {prompt_id}: {grade.reason}")
        return grades
