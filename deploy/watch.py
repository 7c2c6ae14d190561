"""What the driver does while a run runs: supervise, show progress, warn, pass on a stop."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from deploy.coordinator_line import CoordinatorLine
from deploy.interrupt import stop_on_interrupt
from deploy.learner_watch import LearnerWatch
from deploy.metrics.run import RunMetrics
from deploy.nodes import Nodes
from deploy.process_table import write_processes
from deploy.progress import Progress
from deploy.run_dir import RunDir
from deploy.scaling import done, refuse, take_request
from deploy.stall import StallWatch
from deploy.supervisor import Supervisor
from distrl.config import Config
from distrl.errors import ConfigError, RefusedError, RunError

POLL_S = 0.2


class Watch:
    """Looks at the run a few times a second; whatever ends the run is raised here."""

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        supervisor: Supervisor,
        line: CoordinatorLine,
        learners: LearnerWatch,
        progress: Progress,
        metrics: RunMetrics,
        check_counts: Callable[[Mapping[str, int]], object],
    ) -> None:
        """
        Args:
            check_counts: refuses numbers of processes that the cluster has no room for.
        """
        self._metrics = metrics
        self._run_dir = run_dir
        self._supervisor = supervisor
        self._line = line
        self._learners = learners
        self._check_counts = check_counts
        self._nodes = Nodes()
        self._evaluates = config.samples
        self._progress = progress
        self._stall = StallWatch(config.limits.stall_warning_s)
        self._seen = -1
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
        nodes = self._nodes.look()
        asked = self._take_request()
        self._supervisor.vacate({node.node_id: node.goes_s for node in nodes if node.drains}, time.time())
        self._supervisor.tick(snapshot, now)
        if snapshot is not None and not (snapshot["failed"] and snapshot["started"]):
            self._learners.look(snapshot, nodes, now)
        write_processes(self._run_dir, self._supervisor.processes(), self._learners.workers(nodes))
        if asked:
            done(self._run_dir)
        if snapshot is None:
            return None
        if snapshot["started"] and not self._started:
            self._started = True
            first = "evaluating the model before training" if self._evaluates else "training"
            self._progress.phase("going on" if snapshot["resumed"] else first)
        if snapshot["records"]:
            self._seen = snapshot["records"][-1]["number"]
        self._metrics.update({**snapshot, "restarts": self._supervisor.restarts_by_stage()})
        self._progress.update(snapshot)
        where = {process.name: process.where for process in self._supervisor.processes()}
        if warning := self._stall.look(snapshot, now, where):
            self._progress.line(warning)
        return snapshot

    def _take_request(self) -> bool:
        """Whether there is a request for other numbers of processes that was taken up."""
        asked = take_request(self._run_dir)
        if asked is None:
            return False
        try:
            self._check_counts(asked)
        except (ConfigError, RefusedError) as error:
            refuse(self._run_dir, str(error))
            return False
        for stage, count in asked.items():
            if stage == "learners":
                self._learners.resize(count)
                self._line.tell("note", "scaled", f"learners: {count} workers are wanted")
            else:
                self._supervisor.scale(stage, count)
        return True

    def _is_over(self, snapshot: dict[str, Any]) -> bool:
        # Until the stages are up, one that could not start is the better explanation.
        if snapshot["failed"] and snapshot["started"]:
            raise RunError(snapshot["failed"])
        # A learner that has ended has committed its last checkpoint.
        return self._learners.finished() and bool(snapshot["done"] or snapshot["stopping"])
