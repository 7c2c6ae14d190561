"""The tasks of a coordinator, and what ended its run: nothing that goes wrong in the background may be silent."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from actors.recorder import Recorder
from distrl.errors import DistrlError, RunError


class Outcome:
    """Runs tasks whose failure ends the run, and wakes those who wait for a change."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._tasks: set[asyncio.Task[Any]] = set()
        self.changed = asyncio.Condition()
        """Notified whenever something has changed that anybody may wait for."""
        self.fatal: BaseException | None = None
        """What ended the run."""

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Runs a task; its failure ends the run."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)
        return task

    def _end_task(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Ends the run with this cause; every later call of the learner or the driver gets it."""
        if self.fatal is None:
            if isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self.fatal = error
            self._recorder.event("failed", f"{type(error).__name__}: {error}")
        asyncio.get_running_loop().create_task(self.notify())

    async def abort(self, reason: str) -> None:
        """Ends the run now: whoever waits for something gets a RunError with the reason."""
        if self.fatal is None:
            self.fatal = RunError(reason)
        await self.notify()

    def check(self) -> None:
        """Raises what ended the run, if something did."""
        if isinstance(self.fatal, DistrlError):
            raise self.fatal
        if self.fatal is not None:
            raise RunError(f"the coordinator failed: {type(self.fatal).__name__}: {self.fatal}") from self.fatal

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def wait_for(self, event: asyncio.Event) -> None:
        """Returns when the event is set; raises what ended the run instead, if something does.

        The event must be set before a `notify`.
        """
        async with self.changed:
            while not event.is_set():
                self.check()
                await self.changed.wait()
        self.check()
