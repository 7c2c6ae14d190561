"""Several graders of one response: a weighted sum, and the first one's verdict."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from distrl.graders.grade import Grade

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem


class AsyncGrader(Protocol):
    """What the grading stage calls."""

    async def grade(self, problems: Sequence["Problem"], responses: Sequence[str]) -> Sequence[Grade]:
        """One grade per response.

        Raises:
            StageError: one could not be judged.
        """
        ...

    def close(self) -> None: ...


class CombinedGrader:
    """Grades with all graders at the same time; if one fails, so does the ticket's grading.

    The reward is the sum of weight times reward. The verdict and its reason are those of the first grader: the others
    shape the reward. Components are each grader's reward under its name, and its own components behind a period.

    Args:
        members: (name, weight, grader) of each.
        version: of the models and endpoints that they judge by, for the record.
    """

    def __init__(self, members: Sequence[tuple[str, float, AsyncGrader]], version: str = "") -> None:
        self._members = members
        self.version = version

    async def grade(self, problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        tasks = [asyncio.ensure_future(grader.grade(problems, responses)) for _, _, grader in self._members]
        try:
            by_grader = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return [self._combine(grades) for grades in zip(*by_grader, strict=True)]

    def _combine(self, grades: Sequence[Grade]) -> Grade:
        if len(grades) == 1 and self._members[0][1] == 1:
            return grades[0]
        reward = 0.0
        components: dict[str, float] = {}
        for (name, weight, _), grade in zip(self._members, grades, strict=True):
            reward += weight * grade.reward
            components[name] = grade.reward
            # A grader that has one component which is its reward says nothing more with it.
            if list(grade.components.values()) != [grade.reward]:
                components |= {f"{name}.{part}": value for part, value in grade.components.items()}
        return Grade(reward, components, grades[0].verdict, grades[0].reason)

    def close(self) -> None:
        for _, _, grader in self._members:
            grader.close()
