"""What the driver does while a run runs: supervise, show progress, warn, pass on a stop."""

import time
from typing import Any

from deploy.coordinator_line import CoordinatorLine
from deploy.interrupt import stop_on_interrupt
from deploy.metrics.run import RunMetrics
from deploy.process_table import write_processes
from deploy.progress import Progress
from deploy.run_dir import RunDir
from deploy.scaling import done, take_request
from deploy.stall import StallWatch
from deploy.supervisor import Supervisor
from distrl.config import Config
from distrl.errors import RunError
from distrl.messages import Whereabouts
from learners.group import GroupStatus, LearnerGroup

POLL_S = 0.2


class Watch:
    """Looks at the run a few times a second; whatever ends the run is raised here."""

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        supervisor: Supervisor,
        line: CoordinatorLine,
        group: LearnerGroup,
        progress: Progress,
        metrics: RunMetrics,
    ) -> None:
        self._metrics = metrics
        self._run_dir = run_dir
        self._supervisor = supervisor
        self._line = line
        self._group = group
        self._progress = progress
        self._stall = StallWatch(config.limits.stall_warning_s)
        self._seen = -1
        self._learner: Whereabouts | None = None
        self._started = False

    def until_the_end(self) -> dict[str, Any]:
        """Returns the last snapshot of a run that is done or was stopped.

        Raises:
            RunError: the run failed.
        """
        with stop_on_interrupt() as interrupted:
            asked = False
            while True:
                snapshot = self._look()
                if snapshot is not None:
                    if self._is_over(snapshot):
                        return snapshot
                    asked &= bool(snapshot["stopping"])  # a coordinator that was started again must be told again
                    if not asked and (interrupted.is_set() or self._run_dir.stop_request.exists()):
                        asked = True
                        self._progress.line("stopping: the step under way is finished and a checkpoint made")
                        self._line.tell("request_stop")
                time.sleep(POLL_S)

    def _look(self) -> dict[str, Any] | None:
        snapshot = self._line.snapshot(self._seen)
        self._line.check()
        now = time.monotonic()
        asked = take_request(self._run_dir)
        for stage, count in (asked or {}).items():
            self._supervisor.scale(stage, count)
        self._supervisor.tick(snapshot, now)
        if snapshot is not None:
            # A coordinator that was started again has not been told by a learner that lives.
            self._learner = snapshot["learner"]["where"] or self._learner
        write_processes(self._run_dir, self._supervisor.processes(), self._learner)
        if asked is not None:
            done(self._run_dir)
        if snapshot is None:
            return None
        if snapshot["started"] and not self._started:
            self._started = True
            self._progress.phase("going on" if snapshot["resumed"] else "evaluating the model before training")
        if snapshot["records"]:
            self._seen = snapshot["records"][-1]["number"]
        self._metrics.update({**snapshot, "restarts": self._supervisor.restarts_by_stage()})
        self._progress.update(snapshot)
        if warning := self._stall.look(snapshot, now):
            self._progress.line(warning)
        return snapshot

    def _is_over(self, snapshot: dict[str, Any]) -> bool:
        # Until the stages are up, one that could not start is the better explanation.
        if snapshot["failed"] and snapshot["started"]:
            raise RunError(snapshot["failed"])
        status = self._group.status()
        if status == GroupStatus.FAILED:
            raise self._group.error() or RunError("the learner failed")
        # A learner that has ended has committed its last checkpoint.
        return status == GroupStatus.FINISHED and bool(snapshot["done"] or snapshot["stopping"])
