"""Grades in processes of their own, which are killed and replaced when an answer is late."""

import asyncio
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from distrl.errors import ConfigError, StageError
from distrl.graders.grade import Grade, who_failed

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem

START_S = 120.0
"""Seconds that a process may take to build its grader; the time limit of a response begins after that."""
MEMORY_BYTES = 4 << 30
"""Address space of one process: an expression that grows without bound ends in an error and not in the machine's."""


class GraderProcess:
    """One process; blocking, for one thread at a time."""

    def __init__(self, name: str, options: Mapping[str, object]) -> None:
        self._name = name
        self._options = dict(options)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._numbers = itertools.count()

    def grade(self, problem: "Problem", response: str, timeout_s: float) -> Grade:
        """
        Raises:
            StageError: the grader failed, died, or had no answer in time; in the last two cases its process is gone,
                and the next call starts another.
        """
        who = who_failed(self._name, problem, response)
        connection = self._connection or self._start()
        number = next(self._numbers)
        try:
            connection.send((number, problem, response))
            while True:
                if not connection.poll(timeout_s):
                    self.close()
                    raise StageError(
                        f"{who}: it must answer within timeout_s = {timeout_s:g} s; its process was killed"
                    )
                answered, kind, value = connection.recv()
                if answered == number:
                    break  # anything else is an answer nobody waits for
        except (EOFError, OSError) as error:
            status = self._process.wait() if self._process else None
            self.close()
            raise StageError(f"{who}: its process died with status {status}") from error
        if kind == "failed":
            raise StageError(value)
        return value  # type: ignore[no-any-return]

    def _start(self) -> "Connection[Any, Any]":
        ours, theirs = socket.socketpair()
        with theirs:
            environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "distrl.graders.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        connection = self._connection = Connection(ours.detach())
        try:
            connection.send((self._name, self._options, list(sys.path), MEMORY_BYTES))
            if not connection.poll(START_S):
                raise StageError(f"grader {self._name}: its process must be up within {START_S:g} s")
            kind, text = connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise StageError(f"grader {self._name}: its process died while it started") from error
        except StageError:
            self.close()
            raise
        if kind == "refused":
            self.close()
            raise ConfigError(f"grader {self._name} cannot be built in a process of its own: {text}")
        return connection

    def close(self) -> None:
        """Kills the process; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


class ProcessPool:
    """Several processes; each response goes to one that is free.

    Args:
        processes: >= 1; started when they are first needed.
    """

    def __init__(self, name: str, options: Mapping[str, object], processes: int) -> None:
        self._members = [GraderProcess(name, options) for _ in range(processes)]
        self._free: asyncio.Queue[GraderProcess] = asyncio.Queue()
        for member in self._members:
            self._free.put_nowait(member)
        # A process dies with the thread that started it: these threads live as long as the pool.
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix=f"grader-{name}")

    async def grade(self, problems: Sequence["Problem"], responses: Sequence[str], timeout_s: float) -> list[Grade]:
        """Each response has the time limit for itself; the first failure is raised.

        Raises:
            StageError: see `GraderProcess.grade`.
        """
        tasks = [
            asyncio.ensure_future(self._one(problem, response, timeout_s))
            for problem, response in zip(problems, responses, strict=True)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, problem: "Problem", response: str, timeout_s: float) -> Grade:
        member = await self._free.get()
        loop = asyncio.get_running_loop()
        call: asyncio.Future[Grade] = loop.run_in_executor(self._threads, member.grade, problem, response, timeout_s)

        # Should nobody wait any more, the process is free only when its thread is done with it.
        def give_back(done: "asyncio.Future[Grade]") -> None:
            if not done.cancelled():
                done.exception()  # seen, whether or not somebody waits
            self._free.put_nowait(member)

        call.add_done_callback(give_back)
        return await asyncio.shield(call)

    def close(self) -> None:
        for member in self._members:
            member.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
