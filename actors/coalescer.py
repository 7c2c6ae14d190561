"""Puts several tickets into one grading or reference call."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.pool import Member, Pool, anybody, unsuspected
from distrl.errors import DistrlError, StageError


class MakeCall(Protocol):
    async def __call__(self, member: Member, jobs: Sequence[Any]) -> tuple[list[Any], Any]:
        """One call for several jobs: each job's own part of the receipt, or why that job failed; and the reference to
        the batch."""
        ...


@dataclass(slots=True)
class _Job:
    content: Any
    answer: "asyncio.Future[tuple[Any, Any]]"
    alone: bool = False
    """It was part of a call that failed, and gets the next one to itself."""


class Coalescer:
    """Sends what waits, at most `limit` tickets a call, as soon as a worker has a free place.

    A call that fails is made again ticket by ticket, so that one poison ticket spends nobody else's attempts.

    Args:
        suspect: whether a job may be what kills workers; it gets a call of its own, and no second such job is given to
            the same worker.
    """

    def __init__(
        self, pool: Pool, limit: int, call: MakeCall, suspect: Callable[[Any], bool] = lambda content: False
    ) -> None:
        self._pool = pool
        self._limit = limit
        self._call = call
        self._suspect = suspect
        self._queue: deque[_Job] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        pool.on_change(self._dispatch)

    async def submit(self, content: Any) -> tuple[Any, Any]:
        """The job's part of the receipt, and the reference to the batch that holds its rows.

        Raises:
            DistrlError: the job failed in a call of its own.
        """
        job = _Job(content, asyncio.get_running_loop().create_future())
        self._queue.append(job)
        self._dispatch()
        return await job.answer

    def _dispatch(self) -> None:
        held: list[_Job] = []  # suspects that no worker can take now
        while self._queue:
            job = self._queue.popleft()
            if job.answer.done():  # nobody waits for it any more
                continue
            suspect = self._suspect(job.content)
            member = self._pool.take(fits=unsuspected if suspect else anybody)
            if member is None:
                held.append(job)
                if suspect:
                    continue
                break
            jobs = [job]
            while not self._gets_its_own(job) and self._queue and len(jobs) < self._limit:
                if self._gets_its_own(self._queue[0]):
                    break
                jobs.append(self._queue.popleft())
            task = asyncio.get_running_loop().create_task(self._run(member, jobs, suspect))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            member.suspects += suspect
        self._queue.extendleft(reversed(held))

    def _gets_its_own(self, job: _Job) -> bool:
        return job.alone or self._suspect(job.content)

    async def _run(self, member: Member, jobs: list[_Job], suspect: bool) -> None:
        try:
            parts, batch = await self._call(member, [job.content for job in jobs])
            if len(parts) != len(jobs):
                raise StageError(f"{member.name} must answer for each of {len(jobs)} tickets, got {len(parts)} answers")
        except DistrlError as error:
            if len(jobs) > 1:
                for job in reversed(jobs):
                    job.alone = True
                    self._queue.appendleft(job)
            else:
                _refuse(jobs[0], error)
        except BaseException as error:  # a fault of ours or a cancellation: whoever waits must hear of it
            for job in jobs:
                _refuse(job, error)
            raise
        else:
            for job, part in zip(jobs, parts, strict=True):
                if isinstance(part, DistrlError):
                    _refuse(job, part)
                elif not job.answer.done():
                    job.answer.set_result((part, batch))
        finally:
            member.suspects -= suspect
            await self._pool.give_back(member)


def _refuse(job: _Job, error: BaseException) -> None:
    if not job.answer.done():
        job.answer.set_exception(error)
