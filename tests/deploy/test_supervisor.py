"""The supervisor over processes that a test kills, and a coordinator that a test plays."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from deploy.processes import ProcessGoneError
from deploy.supervisor import State, Supervisor
from distrl.config_sections import LimitsConfig
from distrl.errors import DeadlineError, RunError
from distrl.messages import Whereabouts
from tests.builders import refusal


@dataclass
class Handle:
    name: str
    pid: int
    state: str = "up"  # up, silent, away or dead
    node: str = "node"


class FakeProcesses:
    """Answers at once while a process is up."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[str] = []
        self.made = {name: Handle(name, i) for i, name in enumerate(("policy-store", "journal", "coordinator"))}

    def unique(self) -> dict[str, Any]:
        return dict(self.made)

    def start(self, stage: str, name: str) -> Handle:
        self.started.append(name)
        self.made[name] = Handle(name, 100 + len(self.started))
        return self.made[name]

    def stays(self, stage: str) -> bool:
        return stage == "reserved"

    def probe(self, handle: Handle) -> Handle:
        return handle

    def answer(self, question: Handle) -> Whereabouts | None:
        match question.state:
            case "dead":
                raise ProcessGoneError("killed")
            case "away":
                raise InterruptedError("socket closed")
            case "silent":
                return None
        return Whereabouts(question.pid, "here", question.node, 0)

    def end(self, handle: Handle, restart: bool = False) -> None:
        self.ended.append(handle.name)
        if restart:
            handle.pid += 1000
            handle.node = "node"


@dataclass
class FakeCoordinator:
    """Keeps members as the real one does."""

    members: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    started: bool = False
    notes: list[str] = field(default_factory=list)
    learner: Whereabouts | None = None

    def tell(self, method: str, *arguments: Any) -> None:
        match method, arguments:
            case "join_actor", (stage, name, _):
                self.members.setdefault(name, {"stage": stage, "busy": 0, "draining": False})
            case "leave", (name, _):
                self.members.pop(name, None)
                self.lost.pop(name, None)
            case "drain", (name,):
                self.members[name]["draining"] = True
            case "start", ():
                self.started = True
            case "note", (kind, message):
                self.notes.append(f"{kind}: {message}")

    def snapshot(self) -> dict[str, Any]:
        return {
            "crew": {name: dict(member) for name, member in self.members.items()},
            "lost": dict(self.lost),
            "started": self.started,
            "learner": {"where": self.learner},
        }


class System:
    def __init__(self, counts: dict[str, int], **limits: Any) -> None:
        self.processes = FakeProcesses()
        self.coordinator = FakeCoordinator()
        self.limits = LimitsConfig(**{"retry_delay_s": 1.0, **limits})
        self.now = 0.0
        self.supervisor = Supervisor(self.processes, lambda *call: self.coordinator.tell(*call), counts, self.limits)

    def run(self, seconds: float = 5.0, step: float = 0.5) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += step
            self.supervisor.tick(self.coordinator.snapshot(), self.now)

    def handle(self, name: str) -> Handle:
        return self.processes.made[name]


def test_everybody_joins_and_only_then_the_run_starts() -> None:
    system = System({"generation": 2, "grading": 1})
    system.handle("grading-0").state = "silent"
    system.run()
    assert not system.coordinator.started
    system.handle("grading-0").state = "up"
    system.run()
    assert set(system.coordinator.members) == {"generation-0", "generation-1", "grading-0"}
    assert system.coordinator.started


def test_a_dead_member_is_replaced_by_another_process_with_another_name() -> None:
    system = System({"generation": 2})
    system.run()
    system.handle("generation-1").state = "dead"
    system.run()
    assert set(system.coordinator.members) == {"generation-0", "generation-1.1"}
    assert system.supervisor.restarts == 1
    by_stage = system.supervisor.restarts_by_stage()
    assert by_stage["generation"] == 1
    assert sum(by_stage.values()) == 1
    assert {"learner", "generation"} <= by_stage.keys()  # also stages that have lost none are counted
    assert system.coordinator.notes == ["restarted: generation-1 is replaced in 0 s: killed"]


def test_what_the_coordinator_lost_is_replaced_before_any_probe() -> None:
    system = System({"grading": 1})
    system.run()
    del system.coordinator.members["grading-0"]
    system.coordinator.lost["grading-0"] = "3 different tickets in a row failed there"
    system.run()
    assert system.processes.ended == ["grading-0"]
    assert set(system.coordinator.members) == {"grading-0.1"}
    assert system.coordinator.lost == {}


def test_one_that_does_not_answer_is_ended_and_replaced() -> None:
    system = System({"generation": 1}, liveness_timeout_s=30)
    system.run()
    system.handle("generation-0").state = "silent"
    system.run(25)
    assert system.processes.ended == []
    system.run(10)
    assert system.processes.ended == ["generation-0"]
    assert set(system.coordinator.members) == {"generation-0.1"}


def test_one_that_dies_again_and_again_is_replaced_more_and_more_slowly_until_the_run_ends_with_the_cause() -> None:
    system = System({"grading": 1}, restarts=3)
    system.run()
    times = []

    def kill() -> None:
        system.handle(system.processes.started[-1]).state = "dead"
        before = len(system.processes.started)
        died = system.now
        while len(system.processes.started) == before:
            system.run(0.25, step=0.25)
        times.append(system.now - died)
        system.run()

    for _ in range(3):
        kill()
    # A delay of 0, 1 and 2 seconds, after at most PROBE_S and two looks.
    assert [int(t) for t in times] == [0, 1, 2] or [int(t - 1) for t in times] == [0, 1, 2]
    assert refusal(RunError, kill) == (
        "limits.restarts: at most 3 processes may be replaced within limits.restart_window_s = 600 s, grading-0 would "
        "be one more; it ended because: killed"
    )


def test_restarts_outside_the_window_do_not_count() -> None:
    system = System({"grading": 1}, restarts=1, restart_window_s=100)
    for _ in range(4):
        system.run(101)
        system.handle(system.processes.started[-1]).state = "dead"
        system.run()
    assert system.supervisor.restarts == 4


def test_a_coordinator_that_was_started_again_gets_everybody_and_the_start() -> None:
    system = System({"generation": 1, "grading": 1})
    system.run()
    members = set(system.coordinator.members)
    system.handle("coordinator").state = "away"
    system.run(1)
    system.coordinator = FakeCoordinator()
    system.handle("coordinator").state, system.handle("coordinator").pid = "up", 7
    system.run()
    assert set(system.coordinator.members) == members
    assert system.coordinator.started
    assert system.coordinator.notes == ["restarted: coordinator: process 7 instead of 2"]


def test_a_coordinator_that_hangs_is_started_again() -> None:
    system = System({"generation": 1}, liveness_timeout_s=30)
    system.run()
    system.handle("coordinator").state = "silent"
    system.run(35)
    assert system.processes.ended == ["coordinator"]


def test_a_learner_that_comes_back_is_counted() -> None:
    system = System({"generation": 1}, restarts=0)
    system.coordinator.learner = Whereabouts(1, "here", "node", 0)
    system.run()
    system.coordinator.learner = Whereabouts(2, "here", "node", 1)
    with pytest.raises(RunError, match="learner would be one more"):
        system.run()


@pytest.mark.parametrize("kill", [True, False])
def test_one_that_never_came_up_ends_the_run(kill: bool) -> None:
    system = System({"generation": 1}, start_timeout_s=20)
    system.handle("generation-0").state = "dead" if kill else "silent"

    def error() -> None:
        system.run(30)

    if kill:
        assert refusal(RunError, error) == "generation-0 could not start: killed"
    else:
        assert refusal(DeadlineError, error) == ("generation-0 must be up within limits.start_timeout_s = 20 s")


def test_scaling_down_lets_the_newest_finish_what_they_have() -> None:
    system = System({"generation": 3})
    system.run()
    system.coordinator.members["generation-2"]["busy"] = 4
    system.supervisor.scale("generation", 1)
    system.run()
    # The one that was not busy is gone; the other gets nothing new and is there until it has finished.
    assert set(system.coordinator.members) == {"generation-0", "generation-2"}
    assert system.coordinator.members["generation-2"]["draining"]
    system.coordinator.members["generation-2"]["busy"] = 0
    system.run()
    assert set(system.coordinator.members) == {"generation-0"}
    assert sorted(system.processes.ended) == ["generation-1", "generation-2"]


def test_scaling_up_adds_processes_under_new_names() -> None:
    system = System({"grading": 1})
    system.run()
    system.supervisor.scale("grading", 3)
    system.run()
    assert set(system.coordinator.members) == {"grading-0", "grading-1", "grading-2"}
    assert [p.state for p in system.supervisor.processes()].count(State.UP) == 6


def test_processes_leave_a_node_that_is_about_to_go_and_others_start_elsewhere() -> None:
    system = System({"generation": 2, "grading": 1})
    for name in ("generation-1", "policy-store"):
        system.handle(name).node = "spot"
    system.run()
    system.coordinator.members["generation-1"]["busy"] = 2
    for _ in range(3):
        system.supervisor.vacate({"spot": None}, 0.0)
        system.run(1)
    assert set(system.coordinator.members) == {"generation-0", "generation-1", "generation-2", "grading-0"}
    assert system.coordinator.members["generation-1"]["draining"]
    assert system.processes.ended == ["policy-store"]
    system.coordinator.members["generation-1"]["busy"] = 0
    system.run(1)
    assert system.processes.ended == ["policy-store", "generation-1"]
    assert set(system.coordinator.members) == {"generation-0", "generation-2", "grading-0"}


def test_what_is_unfinished_shortly_before_the_node_goes_is_given_to_others() -> None:
    system = System({"generation": 1})
    system.handle("generation-0").node = "spot"
    system.run()
    system.coordinator.members["generation-0"]["busy"] = 2
    system.supervisor.vacate({"spot": 100.0}, 94.0)
    system.run(1)
    system.supervisor.vacate({"spot": 100.0}, 94.9)
    system.run(1)
    assert system.processes.ended == []
    system.supervisor.vacate({"spot": 100.0}, 95.1)
    assert system.processes.ended == ["generation-0"]
    assert system.coordinator.members.keys() == {"generation-1"}


def test_processes_with_reserved_gpus_stay_until_their_node_is_gone() -> None:
    system = System({"reserved": 1})
    system.handle("reserved-0").node = "spot"
    system.run()
    system.supervisor.vacate({"spot": None}, 0.0)
    system.run()
    assert system.processes.started == ["reserved-0"]
    assert not system.coordinator.members["reserved-0"]["draining"]


def test_an_elastic_learner_that_fails_spends_of_the_same_budget_and_its_successor_does_not() -> None:
    system = System({"generation": 1}, restarts=1)
    system.coordinator.learner = Whereabouts(1, "here", "node", 0)
    system.run()
    assert system.supervisor.learner_failed("a node is gone") == 0
    system.run()
    system.coordinator.learner = Whereabouts(2, "here", "node", 1)
    system.run()
    assert system.coordinator.notes == ["restarted: learner: another group begins in 0 s: a node is gone"]
    with pytest.raises(RunError, match="it ended because: a node is gone"):
        system.supervisor.learner_failed("a node is gone")


@pytest.mark.parametrize("how", ["dead", "silent"])
def test_one_of_a_stage_that_has_worked_is_replaced_where_its_node_goes_before_it_is_up(how: str) -> None:
    system = System({"generation": 1}, start_timeout_s=20)
    system.run()
    system.supervisor.scale("generation", 2)
    system.handle("generation-1").state = how
    system.run(30)
    assert set(system.coordinator.members) == {"generation-0", "generation-1.1"}
