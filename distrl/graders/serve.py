"""vLLM's OpenAI-compatible server in a process of its own: `python -m distrl.graders.serve FD ARGUMENT...`.

It ends with the process that holds the other end of the pipe FD, however that one ends.
"""

import os
import runpy
import signal
import sys
import threading

GRACE_S = 5.0
"""Seconds between the signal to end and being ended."""


def end_with(fd: int) -> None:
    """Returns at once; ends this process when nobody holds the other end of the pipe any more."""

    def wait() -> None:
        while os.read(fd, 1):
            pass
        threading.Timer(GRACE_S, os._exit, (1,)).start()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def main() -> None:
    end_with(int(sys.argv[1]))
    sys.argv[:2] = ["vllm"]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    main()
