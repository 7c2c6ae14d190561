"""What sender and receiver have in common: both are processes that end by themselves when nobody needs them."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

LATE = 75
"""Exit status of a process that was late."""

POLL_S = 0.5


def start_child(module: str, connection: Connection, *arguments: str) -> "subprocess.Popen[bytes]":
    """Runs `python -m module FD PARENT ...` with one end of a connection, which the caller then closes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", module, str(connection.fileno()), str(os.getpid()), *arguments]
    return subprocess.Popen(command, pass_fds=[connection.fileno()], env=environment)


def end_with_parent(parent: int) -> None:
    """Ends this process when the one that started it, whose id it was given, has ended, however it did."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


@contextmanager
def bounded(timeout_s: float) -> Iterator[None]:
    """Ends this process if the block takes longer: what hangs in it may be beyond any exception."""
    timer = threading.Timer(timeout_s, os._exit, (LATE,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
