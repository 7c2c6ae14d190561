"""Held-out accuracy, sampled and graded by the same actors as the rollouts."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from actors.beside import Beside
from actors.flights import calls_of
from actors.pipeline import Grades, Pipeline, TicketFailedError
from actors.pool import Member
from distrl.messages import GenerationReceipt
from distrl.schema import Role
from distrl.tasks.problem import Problem


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The accuracy on some held-out problems, one sampled response each."""

    name: str
    step: int
    """Optimizer steps done when it began."""
    oldest_version: int
    newest_version: int
    """Training goes on during an evaluation, so its responses may span policy versions."""
    problems: int
    responses: int
    failed: int
    """Problems without a grade; they count neither as correct nor as wrong."""
    accuracy: float
    standard_error: float
    """Of the accuracy as a binomial proportion: sqrt(p (1 - p) / responses)."""
    reward_mean: float

    def row(self) -> dict[str, object]:
        return asdict(self)


class Evaluator:
    """Samples one response per problem.

    The sampling noise depends on the problem's index only: two evaluations meet the same noise, so that their
    difference has less variance than two independent ones.
    """

    def __init__(self, pipeline: Pipeline, seed: int, clock: Callable[[], float]) -> None:
        self._pipeline = pipeline
        self._beside = Beside(pipeline, seed, clock)
        self._pool = pipeline.pool_of(Role.EVALUATION)
        self.apart = Role.EVALUATION in pipeline.own_pools
        """Whether it has generation actors of its own. They stay at one version until an evaluation has ended, and
        training goes on meanwhile."""
        self.may_load = asyncio.Event()
        """Set while actors of its own may go on to newer weights."""
        self._running = asyncio.Lock()
        self._name = ""

    def report(self, now: float) -> dict[str, Any] | None:
        """The evaluation under way and its problem that waits longest; None where there is none."""
        if not self._name:
            return None
        oldest = self._beside.oldest()
        calls = [] if oldest is None else calls_of(oldest, now)
        return {"name": self._name, "problem": oldest and oldest.ticket.ticket_id, "calls": calls}

    async def run(self, name: str, problems: Sequence[Problem], step: int) -> Evaluation:
        """Evaluates on `problems` with weights of optimizer step `step` or newer.

        Raises:
            TicketFailedError: no problem at all could be graded; carries the last cause.
        """
        self._name = name
        try:
            return await self._run(name, problems, step)
        finally:
            self._name = ""

    async def _run(self, name: str, problems: Sequence[Problem], step: int) -> Evaluation:
        if not self.apart:
            return await self._evaluate(name, problems, step)
        async with self._running:
            self.may_load.set()
            await self._pool.wait_all(lambda member: member.step >= step)
            self.may_load.clear()
            try:
                # They may have gone on while an evaluation before this one was running.
                return await self._evaluate(name, problems, min(member.step for member in self._pool.members))
            finally:
                self.may_load.set()

    async def _evaluate(self, name: str, problems: Sequence[Problem], step: int) -> Evaluation:
        def fits(member: Member) -> bool:
            return member.step >= step

        waiting = iter(enumerate(problems))
        results: list[tuple[GenerationReceipt, Grades]] = []
        failures: list[TicketFailedError] = []

        async def worker() -> None:
            for index, problem in waiting:
                try:
                    results.append(await self._one(index, problem, fits))
                except TicketFailedError as error:
                    failures.append(error)

        places = sum(m.capacity for m in self._pool.members)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(max(1, places), len(problems))):
                group.create_task(worker())
        if not results:
            raise failures[-1]
        responses = sum(g.rollouts for _, g in results)
        accuracy = sum(g.correct for _, g in results) / responses
        return Evaluation(
            name=name,
            step=step,
            oldest_version=min(r.oldest_version for r, _ in results),
            newest_version=max(r.newest_version for r, _ in results),
            problems=len(problems),
            responses=responses,
            failed=len(failures),
            accuracy=accuracy,
            standard_error=math.sqrt(accuracy * (1 - accuracy) / responses),
            reward_mean=sum(g.reward_sum for _, g in results) / responses,
        )

    async def _one(
        self, index: int, problem: Problem, fits: Callable[[Member], bool]
    ) -> tuple[GenerationReceipt, Grades]:
        sampled = await self._beside.sample(Role.EVALUATION, index, problem, 1, fits)
        try:
            return sampled.receipt, await self._pipeline.grade(sampled.flight)
        finally:
            self._beside.done(sampled)
