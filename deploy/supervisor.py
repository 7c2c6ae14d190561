"""Sees that every process of a run lives: replaces dead ones, adds and drains members, and counts."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from deploy.processes import Processes, ProcessGoneError
from deploy.restart_budget import RestartBudget
from distrl.config_sections import LimitsConfig
from distrl.errors import DeadlineError, RunError
from distrl.messages import Whereabouts

PROBE_S = 1.0
"""Seconds between an answer and the next question; a call that fails tells of a death sooner."""


HAND_BACK_S = 5.0
"""Seconds before a node goes at which what is unfinished there is given to others."""


class State(StrEnum):
    STARTING = "starting"
    UP = "up"
    DRAINING = "draining"
    WAITING = "waiting"
    """It ended, and is replaced after a delay."""


@dataclass(slots=True)
class Process:
    """One place in the run and the process that fills it now."""

    stage: str
    slot: str
    name: str
    handle: Any
    state: State
    since_s: float
    """When it came into this state, by the supervisor's clock."""
    where: Whereabouts | None = None
    restarts: int = 0
    question: Any = None
    asked_s: float = 0.0
    heard_s: float = 0.0


Tell = Callable[..., None]
"""Calls a method of the coordinator without waiting: (method, *arguments). While it is away nothing is delivered."""


class Supervisor:
    """Looks at all processes whenever `tick` is called; never waits.

    The liveness clock is this one: a process that does not answer within `limits.liveness_timeout_s` is ended and
    replaced, whether or not anybody waits for it. That nothing moves is the stall clock's business
    (`deploy.stall`), that weights do not arrive the sync deadline's (`limits.sync_timeout_s`).

    Args:
        tell: to the coordinator.
        counts: processes wanted of each stage.
    """

    def __init__(self, processes: Processes, tell: Tell, counts: Mapping[str, int], limits: LimitsConfig) -> None:
        self._processes = processes
        self._tell = tell
        self._limits = limits
        self._budget = RestartBudget(limits.restarts, limits.restart_window_s, limits.retry_delay_s)
        self._crew: dict[str, Process] = {}  # by slot
        self._unique: dict[str, Process] = {
            name: Process(name, name, name, handle, State.STARTING, 0.0) for name, handle in processes.unique().items()
        }
        self._notes: list[tuple[str, str]] = []
        self._proven: set[str] = set()
        self._restarts: Counter[str] = Counter()
        self._learner_pid: tuple[str, int] | None = None
        self._learner_left = False
        self._counts: dict[str, int] = {}
        self._next_index: dict[str, int] = {}
        self._now = 0.0
        for stage, count in counts.items():
            self.scale(stage, count)

    # What there is ----------------------------------------------------------------------------------------------

    @property
    def restarts(self) -> int:
        return self._budget.total

    def restarts_by_stage(self) -> dict[str, int]:
        """Processes replaced, by stage; 0 for a stage that has lost none."""
        stages = {"learner", *self._counts, *(p.stage for p in self.processes())}
        return {stage: self._restarts[stage] for stage in sorted(stages | self._restarts.keys())}

    def processes(self) -> list[Process]:
        return [*self._unique.values(), *self._crew.values()]

    def everybody_is_up(self) -> bool:
        return all(p.state != State.STARTING for p in self.processes())

    def scale(self, stage: str, count: int) -> None:
        """From now on there are to be `count` processes of a stage; those too many drain, the newest first."""
        there = [p for p in self._crew.values() if p.stage == stage and p.state != State.DRAINING]
        for _ in range(count - len(there)):
            index = self._next_index.get(stage, 0)
            self._next_index[stage] = index + 1
            slot = f"{stage}-{index}"
            handle = self._processes.start(stage, slot)
            self._crew[slot] = Process(stage, slot, slot, handle, State.STARTING, self._now)
        for process in reversed(there[count:]):
            self.drain(process)
        if stage in self._counts and self._counts[stage] != count:
            self._note("scaled", f"{stage}: {count} processes instead of {self._counts[stage]}")
        self._counts[stage] = count

    def drain(self, process: Process) -> None:
        """Lets a process finish what it has, then ends it."""
        if process.state in (State.STARTING, State.WAITING):
            self._forget(process, "it is not needed any more")
            return
        process.state, process.since_s = State.DRAINING, self._now
        self._tell("drain", process.name)

    def learner_left(self) -> None:
        """The learner's processes ended because they were asked to: the next ones replace nobody."""
        self._learner_left = True

    def learner_failed(self, cause: str) -> float:
        """The learner's group failed and another one is to begin; seconds to wait before.

        Raises:
            RunError: that is one too many.
        """
        delay_s = self._spend("learner", "learner", cause)
        self._note("restarted", f"learner: another group begins in {delay_s:g} s: {cause}")
        self._learner_left = True
        return delay_s

    def vacate(self, going: Mapping[str, float | None], time_s: float) -> None:
        """Moves processes away from nodes that are about to go: others start elsewhere, and they hand back their work.

        They get nothing new and finish what they have; what they have not finished shortly before their node goes is
        given to others. Ray starts nothing on such a node.

        Args:
            going: nodes by id, with the time at which they go, None where nobody knows.
            time_s: now, in the seconds of these times.
        """
        for process in self.processes():
            if process.where is None or process.where.node not in going:
                continue
            if process.slot in self._unique:
                if process.state == State.UP:
                    self._note("vacated", f"{process.name}: its node goes; it is started again elsewhere")
                    process.state, process.since_s, process.question = State.STARTING, self._now, None
                    self._processes.end(process.handle, restart=True)
            elif process.state == State.UP and not self._processes.stays(process.stage):
                self._note("vacated", f"{process.name}: its node goes; another one starts elsewhere")
                self.drain(process)
                self.scale(process.stage, self._counts[process.stage])
            elif process.state == State.DRAINING:
                goes_s = going[process.where.node]
                if goes_s is not None and time_s > goes_s - HAND_BACK_S:
                    self._forget(process, "its node goes; what it has is given to others")

    # One look ---------------------------------------------------------------------------------------------------

    def tick(self, snapshot: Mapping[str, Any] | None, now_s: float) -> None:
        """Looks at every process and at what the coordinator says of them.

        Args:
            snapshot: the coordinator's last one, None while it is away.
            now_s: monotonic.
        Raises:
            RunError: the restarts are used up, or a process cannot be started again. DeadlineError: one was not up
                within limits.start_timeout_s.
        """
        self._now = now_s
        if snapshot is not None:
            self._compare(snapshot)
            for kind, message in self._notes:
                self._tell("note", kind, message)
            self._notes.clear()
        for process in self.processes():
            self._look(process)

    def _compare(self, snapshot: Mapping[str, Any]) -> None:
        """Brings what the coordinator knows and what there is together; it may have been started anew."""
        by_name = {p.name: p for p in self._crew.values()}
        for name, cause in snapshot["lost"].items():
            if name in by_name and by_name[name].state in (State.UP, State.DRAINING):
                self._replace(by_name[name], cause)
            self._tell("leave", name, cause)
        members = snapshot["crew"]
        for name in members.keys() - by_name.keys():
            self._tell("leave", name, "its process was ended")
        for process in list(self._crew.values()):
            if process.state == State.UP and process.name not in members:
                self._tell("join_actor", process.stage, process.name, process.handle)
            elif process.state == State.DRAINING:
                self._see_draining(process, members.get(process.name))
        stages = {member["stage"] for member in members.values()}
        if not snapshot["started"] and stages == self._counts.keys():
            self._tell("start")
        self._count_learners(snapshot["learner"])

    def _see_draining(self, process: Process, member: Mapping[str, Any] | None) -> None:
        if member is not None and not member["draining"]:
            self._tell("drain", process.name)  # the coordinator that knew of it is gone
        elif member is None or not member["busy"]:
            self._forget(process, "drained")

    def _count_learners(self, learner: Mapping[str, Any]) -> None:
        where = learner["where"]
        if where is None or (where.host, where.pid) == self._learner_pid:
            return
        if self._learner_pid is not None and not self._learner_left:
            self._spend("learner", "learner", "its process ended, see the log of Ray Train's controller")
            self._note("restarted", f"learner: process {where.pid}")
        self._learner_left = False
        self._learner_pid = (where.host, where.pid)

    def _look(self, process: Process) -> None:
        if process.state == State.WAITING:
            if self._now >= process.since_s:
                self._start_again(process)
            return
        if process.question is None:
            if process.state == State.STARTING or self._now - process.heard_s >= PROBE_S:
                process.question, process.asked_s = self._processes.probe(process.handle), self._now
            return
        try:
            where = self._processes.answer(process.question)
        except InterruptedError:
            self._interrupted(process)
            return
        except ProcessGoneError as error:
            self._ended(process, str(error))
            return
        if where is None:
            self._check_late(process)
            return
        self._heard(process, where)

    def _interrupted(self, process: Process) -> None:
        """Ray starts a unique process again; it is asked until it answers."""
        process.question = None
        limit = self._limits.start_timeout_s
        if process.state != State.STARTING:
            process.state, process.since_s = State.STARTING, self._now
        elif self._now - process.since_s > limit:
            raise DeadlineError(f"{process.name} must be up again within limits.start_timeout_s = {limit:g} s")

    def _heard(self, process: Process, where: Whereabouts) -> None:
        process.question, process.heard_s = None, self._now
        if process.slot in self._unique and process.where is not None and process.where != where:
            process.restarts += 1
            self._spend(process.stage, process.slot, "its process ended")
            self._note("restarted", f"{process.name}: process {where.pid} instead of {process.where.pid}")
        process.where = where
        if process.state == State.STARTING:
            process.state, process.since_s = State.UP, self._now
            self._proven.add(process.stage)

    def _check_late(self, process: Process) -> None:
        starting = process.state == State.STARTING
        limit = self._limits.start_timeout_s if starting else self._limits.liveness_timeout_s
        if self._now - process.asked_s <= limit:
            return
        if starting and not self._is_proven(process):
            raise DeadlineError(f"{process.name} must be up within limits.start_timeout_s = {limit:g} s")
        key = "start_timeout_s" if starting else "liveness_timeout_s"
        cause = f"it must answer within limits.{key} = {limit:g} s, it did not"
        if process.slot in self._unique:
            process.question = None
            self._processes.end(process.handle, restart=True)
            self._note("liveness", f"{process.name}: {cause}; it is started again")
        else:
            self._replace(process, cause)

    # Replacing --------------------------------------------------------------------------------------------------

    def _ended(self, process: Process, cause: str) -> None:
        if process.state == State.STARTING and process.restarts == 0 and not self._is_proven(process):
            # Nobody has seen it work: the config, the model or the machine is at fault, and the next would fail too.
            raise RunError(f"{process.name} could not start: {cause}")
        if process.slot in self._unique:
            raise RunError(f"{process.name} could not be started again: {cause}")
        if process.state == State.DRAINING:
            self._forget(process, cause)
        else:
            self._replace(process, cause)

    def _is_proven(self, process: Process) -> bool:
        """Whether one of its stage has worked: then one that does not come up is its node's fault."""
        return process.slot not in self._unique and process.stage in self._proven

    def _replace(self, process: Process, cause: str) -> None:
        delay_s = self._spend(process.stage, process.slot, cause)
        self._tell("leave", process.name, cause)
        self._processes.end(process.handle)
        self._note("restarted", f"{process.name} is replaced in {delay_s:g} s: {cause}")
        process.restarts += 1
        process.where = process.question = None
        process.state, process.since_s = State.WAITING, self._now + delay_s

    def _spend(self, stage: str, slot: str, cause: str) -> float:
        """Counts a restart; see `RestartBudget.spend`."""
        self._restarts[stage] += 1
        return self._budget.spend(slot, cause, self._now)

    def _start_again(self, process: Process) -> None:
        process.name = f"{process.slot}.{process.restarts}"
        process.handle = self._processes.start(process.stage, process.name)
        process.state, process.since_s = State.STARTING, self._now

    def _forget(self, process: Process, cause: str) -> None:
        self._tell("leave", process.name, cause)
        self._processes.end(process.handle)
        del self._crew[process.slot]

    def _note(self, kind: str, message: str) -> None:
        self._notes.append((kind, message))
