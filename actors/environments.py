"""Environments in a process of their own: a slow or dead one holds up nobody but its own episodes."""

import asyncio
import inspect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from distrl.environments import protocol
from distrl.environments.protocol import Environment, Step
from distrl.errors import StageError
from distrl.tasks.problem import Problem


@dataclass(slots=True)
class _Session:
    environment: Environment
    problem: Problem
    used_s: float


class EnvironmentHost:
    """Plays many episodes at the same time, each with an environment of its own.

    Every call of an environment has a thread, so that one that hangs blocks neither the others nor this process.

    Args:
        make: a new environment.
        forget_s: seconds after which an episode that nobody asked about is forgotten: its generation actor is gone.
        clock: seconds.
    """

    def __init__(
        self, make: Callable[[], Environment], forget_s: float = 3600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._make = make
        self._forget_s = forget_s
        self._clock = clock
        self._sessions: dict[str, _Session] = {}

    @ray.method
    async def open(self, name: str, problem: Problem) -> str:
        """Begins an episode under a name; one of the same name, whose caller gave up, is forgotten.

        Raises:
            StageError: the environment failed.
        """
        now = self._clock()
        self._sessions = {k: s for k, s in self._sessions.items() if now - s.used_s < self._forget_s}

        async def begin() -> tuple[Environment, str]:
            environment = self._make()
            return environment, await protocol.reset(environment, problem)

        environment, observation = await _in_thread(begin)
        self._sessions[name] = _Session(environment, problem, now)
        return str(observation)

    @ray.method
    async def step(self, name: str, message: str) -> Step:
        """The model's next message in an episode.

        Raises:
            StageError: the environment failed, or there is no such episode (this process is another one).
        """
        session = self._sessions.get(name)
        if session is None:
            raise StageError(f"environment: the episode {name} must have begun here, it has not; begin it again")
        session.used_s = self._clock()
        answer: Step = await _in_thread(lambda: protocol.step(session.environment, session.problem, message))
        return answer

    @ray.method
    async def close(self, name: str) -> None:
        """Forgets an episode; an environment with a `close` is told."""
        session = self._sessions.pop(name, None)
        close: Any = getattr(session.environment, "close", None) if session is not None else None
        if close is not None:

            async def end() -> None:
                answer = close()
                if inspect.isawaitable(answer):
                    await answer

            await _in_thread(end)

    @ray.method
    async def episodes(self) -> int:
        """Episodes under way."""
        return len(self._sessions)


async def _in_thread(call: Callable[[], Any]) -> Any:
    """Runs an asynchronous function in a loop and thread of its own; if its caller is cancelled, it goes on unheard."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if not answer.done():
            answer.set_result(value) if error is None else answer.set_exception(error)

    def work() -> None:
        value, failure = None, None
        try:
            value = asyncio.run(call())
        except BaseException as error:  # noqa: BLE001  (whoever waits must hear of it)
            failure = error if isinstance(error, Exception) else StageError(f"environment ended with {error!r}")
        try:
            loop.call_soon_threadsafe(settle, value, failure)
        except RuntimeError:
            return  # the loop is closed: nobody waits

    threading.Thread(target=work, name="environment", daemon=True).start()
    return await answer
