"""Grades in threads. One that hangs is given up: no other call waits for it, and its answer counts for nothing."""

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distrl.errors import StageError
from distrl.graders.grade import Grade, Grader, one_each

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem

MOST_LOST = 32
"""Threads that may hang at a time; they cannot be ended, and each holds memory."""


class ThreadPool:
    """A thread per call. How many there are at a time is bounded by whoever calls."""

    def __init__(self, name: str, grader: Grader) -> None:
        self._name = name
        self._grader = grader
        self._lost: set[threading.Thread] = set()

    async def grade(self, problems: Sequence["Problem"], responses: Sequence[str], timeout_s: float) -> list[Grade]:
        """The call has the time limit for all its responses.

        Raises:
            StageError: the grader failed, lied about the number of its answers, or had none in time.
        """
        self._lost = {thread for thread in self._lost if thread.is_alive()}
        if len(self._lost) >= MOST_LOST:
            raise StageError(
                f"grader {self._name}: at most {MOST_LOST} of its calls may hang at a time; give it processes of its "
                "own, which can be killed: set processes in its section of reward.graders"
            )
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Sequence[Grade]] = loop.create_future()

        def settle(grades: Sequence[Grade] | None, error: BaseException | None) -> None:
            if answer.done():
                return  # late: the call was given up
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(grades or [])

        def work() -> None:
            grades: Sequence[Grade] | None = None
            failure: BaseException | None = None
            try:
                grades = self._grader(problems, responses)
            except BaseException as error:  # noqa: BLE001  (whoever waits must hear of it)
                failure = error if isinstance(error, StageError) else _failure(self._name, error)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(settle, grades, failure)

        thread = threading.Thread(target=work, name=f"grader-{self._name}", daemon=True)
        thread.start()
        try:
            async with asyncio.timeout(timeout_s):
                grades = await answer
        except TimeoutError:
            self._lost.add(thread)
            prompts = ", ".join(dict.fromkeys(p.prompt_id for p in problems))
            raise StageError(
                f"grader {self._name} failed on prompt {prompts}: it must answer within timeout_s = {timeout_s:g} s"
            ) from None
        except asyncio.CancelledError:
            self._lost.add(thread)
            raise
        return list(one_each(self._name, grades, responses))

    def close(self) -> None:
        """Threads that hang stay until the process ends."""


def _failure(name: str, error: BaseException) -> StageError:
    failure = StageError(f"grader {name} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
