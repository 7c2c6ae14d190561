"""An asyncio event loop whose time is virtual: it never sleeps, and one seed gives one order of events."""

import asyncio
import random
import selectors
from collections.abc import Callable
from typing import Any

MOST_TURNS = 300_000
"""Turns of the loop after which a schedule counts as one that never ends."""


class NeverEndsError(AssertionError):
    """Everybody waits for somebody, or the loop turns without end."""


class _NoWait(selectors.SelectSelector):
    """Where a real loop would sleep, the clock jumps to the next timer."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[Any]:
        self.loop.turn(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs what asyncio runs, threads included, in one thread and in an order that the generator decides.

    Args:
        rng: of tasks that are ready at the same moment, any may go first.
    """

    def __init__(self, rng: random.Random) -> None:
        self._now = 0.0
        self._rng = rng
        self._turns = 0
        selector = _NoWait()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self._now

    def turn(self, timeout: float | None) -> None:
        """Advances the clock by a sleep of `timeout` seconds; None means that nobody will ever wake up."""
        self._turns += 1
        if timeout is None:
            raise NeverEndsError(f"at {self._now:.3f} s everybody waits for somebody")
        if self._turns > MOST_TURNS:
            raise NeverEndsError(f"after {self._turns} turns the run has not ended, at {self._now:.3f} s")
        self._now += max(0.0, timeout)

    def end(self) -> None:
        """Ends all tasks that are left, and the loop."""
        self._turns = 0
        for _ in range(100):
            tasks = asyncio.all_tasks(self)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.close()

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        handle = super().call_soon(callback, *args, context=context)
        ready: Any = self._ready  # type: ignore[attr-defined]
        # Only a task's next step changes places with another's: bookkeeping of futures keeps its order.
        if len(ready) > 1 and _is_step(ready[-2]) and _is_step(handle) and self._rng.random() < 0.3:
            ready[-1], ready[-2] = ready[-2], ready[-1]
        return handle

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """In place of a thread: done at once, which is one of the orders that threads allow."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  (goes to whoever awaits the future, as a thread's would)
            future.set_exception(error)
        return future


def _is_step(handle: Any) -> bool:
    return type(handle._callback).__name__ in ("TaskStepMethWrapper", "task_wakeup", "method-wrapper")
