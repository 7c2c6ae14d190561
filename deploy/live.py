"""What a running run says of itself beside its records: `live.json`, for the live page and the doctor."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from deploy.report.files import read_json
from deploy.run_dir import RunDir, write_json

EVERY_S = 1.0
STALE_S = 15.0
"""A state that is older than this is not that of a healthy driver."""
_KEPT = (
    *("step", "stages", "granted", "oldest", "learner_waiting", "generation_held", "stopping", "failed", "done"),
    *("members", "busy", "tickets"),
)


class LiveState:
    """Writes the coordinator's snapshot, without its records, at most once a second.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, run_dir: RunDir, clock: Callable[[], float] = time.time) -> None:
        self._run_dir = run_dir
        self._clock = clock
        self._written_s = float("-inf")
        self._progress: object = None
        self._progress_s = clock()

    def update(self, snapshot: Mapping[str, Any]) -> None:
        now = self._clock()
        progress = (snapshot["step"], dict(snapshot["rollouts"]), dict(snapshot["tickets"]))
        if progress != self._progress:
            self._progress, self._progress_s = progress, now
        if now - self._written_s < EVERY_S:
            return
        self._written_s = now
        kept = {name: snapshot.get(name) for name in _KEPT}
        write_json(self._run_dir.live, {"time_s": now, "progress_s": self._progress_s, **kept})

    def close(self) -> None:
        self._run_dir.live.unlink(missing_ok=True)


def read_live(run_dir: RunDir) -> dict[str, Any] | None:
    """The last state of a run that is running or died; None where it has none."""
    return read_json(run_dir.live) if run_dir.live.is_file() else None
