"""`processes.json` in the run's directory: which process does what, for people and for tools on the same machine."""

import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from typing import Any

from deploy.run_dir import RunDir, write_json
from deploy.supervisor import Process, State
from distrl.messages import Whereabouts


def write_processes(
    run_dir: RunDir, processes: Iterable[Process], learners: Sequence[tuple[Whereabouts, State]] = ()
) -> None:
    """Writes the table where it differs from the one that is there.

    Args:
        learners: the learner's workers in the order of their ranks.
    """
    rows = [
        {"name": "driver", "stage": "driver", "state": "up", "pid": os.getpid(), "host": socket.gethostname()},
        *(_row(p.name, p.stage, str(p.state), p.restarts, p.where) for p in processes),
        *(
            _row(f"learner-{rank}" if rank else "learner", "learner", str(state), 0, where)
            for rank, (where, state) in enumerate(learners)
        ),
    ]
    table = {"processes": rows}
    path = run_dir.processes
    if not path.exists() or json.loads(path.read_text())["processes"] != rows:
        write_json(path, {**table, "time_s": time.time()})


def read_processes(run_dir: RunDir) -> list[dict[str, Any]]:
    """The rows that the driver wrote last; none before it began."""
    if not run_dir.processes.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(run_dir.processes.read_text())["processes"]
    return rows


def _row(name: str, stage: str, state: str, restarts: int, where: Whereabouts | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "stage": stage, "state": state, "restarts": restarts}
    if where is not None:
        row |= {"pid": where.pid, "host": where.host, "node": where.node}
    return row
