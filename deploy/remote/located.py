"""What every actor of a run can be asked: which process it is, and thereby whether it lives."""

import os
import socket
import time

import ray

from distrl.messages import Whereabouts

_STARTED_NS = time.time_ns()


def whereabouts() -> Whereabouts:
    """This process."""
    return Whereabouts(os.getpid(), socket.gethostname(), ray.get_runtime_context().get_node_id(), _STARTED_NS)


class Located:
    """Answers the supervisor's probe."""

    @ray.method
    async def whereabouts(self) -> Whereabouts:
        return whereabouts()
