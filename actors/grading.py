"""Grading: turns responses into rewards; a slow or failing grader delays and fails only what it grades."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from actors.comparing import Compared, against_opponents, within_pairs
from distrl.errors import StageError
from distrl.graders.combined import AsyncGrader
from distrl.graders.grade import Grade, Response, one_each, who_failed
from distrl.messages import GradingReceipt
from distrl.preferences import Comparison
from distrl.schema import Role, Stage, record_batch
from distrl.tasks.problem import Problem


class Grading:
    """Grades whole tickets.

    Args:
        grader_name: for the `grader` column.
        comparison: of responses; None where nothing reads a preference.
        opponents: that each response meets, with a comparison; 0 compares the responses of a ticket in pairs.
        concurrency: tickets graded at the same time.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        grader_name: str,
        grader: AsyncGrader,
        concurrency: int,
        clock: Callable[[], float] = time.time,
        comparison: Comparison | None = None,
        opponents: int = 0,
    ) -> None:
        self._name = grader_name
        self._grader = grader
        self._clock = clock
        self._comparison = comparison
        self._opponents = opponents
        self._places = asyncio.Semaphore(concurrency)

    @ray.method(num_returns=2)
    async def grade(
        self, problems: Mapping[str, Problem], *batches: pa.RecordBatch
    ) -> tuple[GradingReceipt, pa.RecordBatch]:
        """Grades the rollouts of several tickets, one generation batch each; opponents of a ticket are a batch of their
        own, with its number.

        A ticket that cannot be graded is named in the receipt, and its rollouts are not in the batch.

        Args:
            problems: by prompt id, for every rollout of the batches.
        Raises:
            StageError: no ticket could be graded; never a reward instead.
        """
        started_s = self._clock()
        opponents = {batch.column("ticket_id")[0].as_py(): batch for batch in batches if _role(batch) == Role.OPPONENT}
        batches = tuple(batch for batch in batches if _role(batch) != Role.OPPONENT)
        found = await asyncio.gather(*(self._judged(problems, batch, opponents) for batch in batches))
        failures = tuple(str(one) if isinstance(one, StageError) else None for one in found)
        graded = [() if isinstance(one, StageError) else one[0] for one in found]
        preferences = [p for one in found if not isinstance(one, StageError) for p in one[1]]
        for error in found:
            if isinstance(error, StageError) and all(failures):
                raise error
        ids = [
            rollout_id
            for batch, failure in zip(batches, failures, strict=True)
            for rollout_id in (batch.column("rollout_id").to_pylist() if failure is None else ())
        ]
        finished_s = self._clock()
        batch = self._batch(ids, [g for ticket in graded for g in ticket], preferences, (started_s, finished_s))
        receipt = GradingReceipt(
            reward_sums=tuple(sum(g.reward for g in ticket) for ticket in graded),
            correct=tuple(sum(g.verdict == "correct" for g in ticket) for ticket in graded),
            rollouts=tuple(len(ticket) for ticket in graded),
            components=tuple(_means(ticket) for ticket in graded),
            failures=failures,
            bytes=batch.nbytes,
            started_s=started_s,
            finished_s=finished_s,
        )
        return receipt, batch

    @ray.method
    async def close(self) -> None:
        """Ends the graders' own processes."""
        self._grader.close()

    def _batch(
        self,
        rollout_ids: Sequence[str],
        grades: Sequence[Grade],
        preferences: Sequence[float | None],
        time_s: tuple[float, float],
    ) -> pa.RecordBatch:
        columns: dict[str, Any] = {
            "rollout_id": rollout_ids,
            "reward": [g.reward for g in grades],
            "verdict": [g.verdict for g in grades],
            "reason": [g.reason for g in grades],
            "components": [list(g.components.items()) for g in grades],
            "grader": [self._name] * len(grades),
            "preference": preferences,
            "grading_started_s": [time_s[0]] * len(grades),
            "grading_finished_s": [time_s[1]] * len(grades),
        }
        return record_batch(Stage.GRADING, columns)

    async def _judged(
        self, problems: Mapping[str, Problem], batch: pa.RecordBatch, opponents: Mapping[int, pa.RecordBatch]
    ) -> tuple[Sequence[Grade], Sequence[float | None]] | StageError:
        """Grades of a ticket, and the preferences of its responses, null where nobody compares them."""
        grades = await self._ticket(problems, batch)
        if isinstance(grades, StageError):
            return grades
        comparison = self._comparison
        if comparison is None or _role(batch) != Role.POLICY:
            return grades, [None] * len(grades)
        problem = problems[batch.column("prompt_id")[0].as_py()]
        ours = [grade.reward for grade in grades]
        try:
            if not self._opponents:
                found = await asyncio.to_thread(within_pairs, comparison, problem, batch, ours)
                return _with_disagreement(grades, found), [one.preference for one in found]
            theirs = opponents.get(number := batch.column("ticket_id")[0].as_py())
            if theirs is None:
                raise StageError(f"ticket {number} must be graded with its opponents, got none")
            rewards = None
            if comparison.reads_rewards:
                met = await self._ticket(problems, theirs)
                if isinstance(met, StageError):
                    return met
                rewards = (ours, [grade.reward for grade in met])
            found = await asyncio.to_thread(
                against_opponents, comparison, problem, batch, theirs, rewards, self._opponents
            )
            return _with_disagreement(grades, found), [one.preference for one in found]
        except StageError as error:
            return error

    async def _ticket(self, problems: Mapping[str, Problem], batch: pa.RecordBatch) -> Sequence[Grade] | StageError:
        rows = [problems[prompt_id] for prompt_id in batch.column("prompt_id").to_pylist()]
        responses = _responses(batch)
        try:
            async with self._places:
                grades = one_each(self._name, await self._grader.grade(rows, responses), responses)
            for problem, response, grade in zip(rows, responses, grades, strict=True):
                if grade.verdict == "failed":
                    raise StageError(f"{who_failed(self._name, problem, response)}: {grade.reason}")
        except StageError as error:
            return error
        return grades


def _with_disagreement(grades: Sequence[Grade], found: Sequence[Compared]) -> Sequence[Grade]:
    """Where a judge was asked in both orders, how far apart its answers were is a component."""
    return [
        grade
        if one.disagreement is None
        else replace(grade, components={**grade.components, "disagreement": one.disagreement})
        for grade, one in zip(grades, found, strict=True)
    ]


def _means(grades: Sequence[Grade]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for grade in grades:
        for name, value in grade.components.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: total / len(grades) for name, total in sums.items()}


def _role(batch: pa.RecordBatch) -> str:
    return str(batch.column("role")[0].as_py())


def _responses(batch: pa.RecordBatch) -> list[Response]:
    columns = ("text", "rollout_id", "max_new_tokens", "finish_reason", "turn_rewards")
    rows = batch.select(columns).to_pylist()
    tokens = pc.list_value_length(batch.column("response_token_ids")).to_pylist()
    return [
        Response(
            row["text"],
            row["rollout_id"],
            length,
            row["max_new_tokens"],
            row["finish_reason"],
            tuple(row["turn_rewards"]),
        )
        for row, length in zip(rows, tokens, strict=True)
    ]
