"""One grader with its limits: time, attempts, calls at a time, and a cache."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from distrl.errors import StageError
from distrl.graders.grade import Grade, check_range, checked, one_each, who_failed

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem


class Backend(Protocol):
    """Where a grader runs."""

    async def grade(
        self, problems: Sequence["Problem"], responses: Sequence[str], timeout_s: float
    ) -> Sequence[Grade]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one grader."""

    timeout_s: float
    """Seconds of one call: a ticket's responses together, or one response in a process of its own."""
    attempts: int = 1
    """Calls that may fail before the ticket's grading fails."""
    concurrency: int = 8
    """Tickets at a time."""
    cached: int = 0
    """Grades that are kept; 0 keeps none."""
    range: tuple[float, float] | None = None
    """Rewards outside are refused."""


class LimitedGrader:
    """Calls a backend within limits.

    Args:
        version: of the grader and what it judges by; grades of another version are other grades.
        content: version of the model or endpoint that it judges by; empty where there is none.
    """

    def __init__(self, name: str, backend: Backend, limits: Limits, version: str = "", content: str = "") -> None:
        self.name = name
        self._backend = backend
        self._limits = limits
        self._version = version
        self.content = content
        self._places = asyncio.Semaphore(limits.concurrency)
        self._cache: OrderedDict[bytes, Grade] = OrderedDict()
        self.calls = 0
        """Calls of the backend so far."""

    async def grade(self, problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        """One grade per response, in their order.

        Raises:
            StageError: the attempts are used up; the message has the last cause. Nothing is returned for the others.
        """
        keys = [self._key(p, r) for p, r in zip(problems, responses, strict=True)]
        found = {key: grade for key in keys if (grade := self._cached(key)) is not None}
        open_rows = [row for row, key in enumerate(keys) if key not in found]
        if self._limits.cached:  # the same response twice is graded once
            open_rows = list({keys[row]: row for row in reversed(open_rows)}.values())[::-1]
        if open_rows:
            grades = await self._attempts([problems[r] for r in open_rows], [responses[r] for r in open_rows])
            if not self._limits.cached:
                return grades
            for row, grade in zip(open_rows, grades, strict=True):
                found[keys[row]] = grade
                self._keep(keys[row], grade)
        return [found[key] for key in keys]

    async def _attempts(self, problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        for left in reversed(range(self._limits.attempts)):
            try:
                return await self._call(problems, responses)
            except StageError:
                if not left:
                    raise
        raise AssertionError("attempts is at least 1")

    async def _call(self, problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        async with self._places:
            self.calls += 1
            grades = await self._backend.grade(problems, responses, self._limits.timeout_s)
        found = []
        for problem, response, grade in zip(problems, responses, one_each(self.name, grades, responses), strict=True):
            who = who_failed(self.name, problem, response)
            found.append(checked(who, self.name, grade))
            if self._limits.range is not None:
                check_range(who, self._limits.range, found[-1])
        return found

    def _key(self, problem: "Problem", response: str) -> bytes:
        if not self._limits.cached:
            return b""
        # A prompt id names the content of prompt, answer and metadata.
        parts = (self.name, self._version, problem.prompt_id, str(response))
        digest = hashlib.sha256()
        for part in parts:
            content = part.encode(errors="surrogatepass")
            digest.update(len(content).to_bytes(8, "big") + content)
        return digest.digest()

    def _cached(self, key: bytes) -> Grade | None:
        grade = self._cache.get(key)
        if grade is not None:
            self._cache.move_to_end(key)
        return grade

    def _keep(self, key: bytes, grade: Grade) -> None:
        self._cache[key] = grade
        while len(self._cache) > self._limits.cached:
            self._cache.popitem(last=False)

    def close(self) -> None:
        self._backend.close()
