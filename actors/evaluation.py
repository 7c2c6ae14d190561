"""Held-out accuracy, sampled and graded by the same actors as the rollouts."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from actors.flight import Flight
from actors.pipeline import Grades, Pipeline, TicketFailedError
from actors.pool import Member
from distrl.messages import GenerationReceipt
from distrl.schema import Role
from distrl.seeding import Purpose
from distrl.tasks.problem import Problem
from distrl.tickets import Ticket


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
        self._seed = seed
        self._clock = clock

    async def run(
        self, name: str, problems: Sequence[Problem], step: int, fits: Callable[[Member], bool]
    ) -> Evaluation:
        """Evaluates on `problems` with the members that fit.

        Raises:
            TicketFailedError: no problem at all could be graded; carries the last cause.
        """
        waiting = iter(enumerate(problems))
        results: list[tuple[GenerationReceipt, Grades]] = []
        failures: list[TicketFailedError] = []

        async def worker() -> None:
            for index, problem in waiting:
                try:
                    results.append(await self._one(index, problem, fits))
                except TicketFailedError as error:
                    failures.append(error)

        places = sum(m.capacity for m in self._pipeline.generation.members)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(places, len(problems))):
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
        ticket = Ticket(
            ticket_id=index,
            redraw=0,
            prompt_id=problem.prompt_id,
            prompt=problem.prompt,
            role=Role.EVALUATION,
            group_size=1,
            stream=(self._seed, int(Purpose.EVALUATION), index, 0),
            messages=problem.messages,
        )
        flight = Flight(ticket, problem, oldest_step=0, issued_s=self._clock())
        receipt = await self._pipeline.sample(flight, None, fits)
        return receipt, await self._pipeline.grade(flight)
