"""A process of its own for a grader that may hang: `python -m distrl.graders.worker FD`.

Over the socket FD it gets what to build, says that it is ready, then answers one response at a time. Whoever started
it kills it when an answer is late. It dies with the thread that started it.
"""

import ctypes
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from distrl.errors import DistrlError, StageError
from distrl.graders.grade import one_each

_PR_SET_PDEATHSIG = 1


def main(fd: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    connection: Connection[Any, Any] = Connection(fd)
    name, options, folders, memory_bytes = connection.recv()
    sys.path.extend(folder for folder in folders if folder not in sys.path)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A grader that prints must not end on a full or closed pipe of the parent.
    os.dup2(2, 1)
    try:
        from distrl.graders.registry import make_grader

        grader = make_grader(name, options=options)
    except Exception as error:  # noqa: BLE001  (the parent raises it)
        connection.send(("refused", f"{type(error).__name__}: {error}"))
        return
    connection.send(("ready", None))
    while True:
        try:
            number, problem, response = connection.recv()
        except EOFError:
            return
        answer: tuple[str, Any]
        try:
            answer = ("grade", one_each(name, grader([problem], [response]), [response])[0])
        except DistrlError as error:
            answer = ("failed", str(error))
        except (Exception, MemoryError) as error:  # noqa: BLE001
            answer = ("failed", str(StageError(f"grader {name} failed: {type(error).__name__}: {error}")))
        connection.send((number, *answer))


if __name__ == "__main__":
    main(int(sys.argv[1]))
