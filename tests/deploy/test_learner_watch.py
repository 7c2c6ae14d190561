"""The learner's group under requests, deaths and stops that a test plays."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from deploy.learner_watch import LearnerWatch, Size
from deploy.nodes import ClusterNode, learner_room
from deploy.ray_train import RESOURCE
from deploy.supervisor import State
from distrl.errors import RunError
from distrl.messages import Whereabouts
from learners.group import GroupStatus
from tests.builders import refusal

STEPS = 10


def node(name: str, room: float = 1.0, drains: bool = False) -> ClusterNode:
    return ClusterNode(name, {RESOURCE: room}, drains)


@dataclass
class FakeGroup:
    """Does what the test says."""

    started: list[int] = field(default_factory=list)
    state: GroupStatus = GroupStatus.STARTING
    cause: RunError | None = None

    def start(self, workers: int) -> None:
        self.started.append(workers)
        self.state = GroupStatus.RUNNING

    def status(self) -> GroupStatus:
        return self.state

    def error(self) -> BaseException | None:
        return self.cause

    def stop(self, timeout_s: float) -> None:
        pass


class System:
    """A watch over a group and a coordinator that a test plays."""

    def __init__(self, workers: int = 1, most: int | None = None, nodes: int = 1) -> None:
        self.group = FakeGroup()
        self.told: list[tuple[str, int]] = []
        self.ended = 0
        self.step = 3
        self.stopping = False
        self.session, self.leaves = 0, False
        self.processes: tuple[Whereabouts, ...] = ()
        self.now = 0.0
        self.failures: list[str] = []
        self.nodes = [node(f"node-{i}") for i in range(nodes)]
        size = Size(workers, most or workers, "cpu")
        self.watch = LearnerWatch(self.group, self._tell, self._end, self._fail, size, STEPS)
        self.watch.start(self.nodes)
        self.sits()

    def _tell(self, method: str, *arguments: Any) -> None:
        self.told.append((method, *arguments))
        self.leaves |= arguments == (self.session,)

    def _fail(self, cause: str) -> float:
        self.failures.append(cause)
        return 2.0 * (len(self.failures) - 1)

    def _end(self) -> None:
        self.ended += 1

    def sits(self) -> None:
        """Processes of the group that was started last begin."""
        self.session, self.leaves = self.session + 1, False
        count = self.group.started[-1]
        self.processes = tuple(Whereabouts(100 * self.session + i, "here", f"node-{i}", 0) for i in range(count))
        self.look()

    def leave(self) -> None:
        self.group.state = GroupStatus.FINISHED
        self.look()

    def look(self) -> None:
        learner = {"workers": self.processes, "session": self.session, "leaves": self.leaves}
        snapshot = {"learner": learner, "stopping": self.stopping, "done": False, "step": self.step}
        self.now += 1.0
        self.watch.look(snapshot, self.nodes, self.now)

    @property
    def states(self) -> list[State]:
        return [state for _, state in self.watch.workers(self.nodes)]


def test_a_group_leaves_and_another_one_with_the_other_number_goes_on() -> None:
    system = System()
    assert system.states == [State.UP]
    system.watch.resize(2)
    for _ in range(3):
        system.look()
    assert system.told == [("release_learner", 1)]
    assert system.states == [State.DRAINING]
    system.leave()
    assert (system.group.started, system.ended) == ([1, 2], 1)
    assert system.states == [State.STARTING]
    system.sits()
    system.look()
    assert system.states == [State.UP, State.UP]
    assert len(system.told) == 1


def test_the_same_number_asks_nobody_to_leave() -> None:
    system = System(workers=2)
    system.watch.resize(2)
    system.look()
    assert (system.told, system.states) == ([], [State.UP, State.UP])


def test_a_second_request_before_the_group_has_left_decides_what_is_started() -> None:
    system = System()
    system.watch.resize(2)
    system.look()
    system.watch.resize(1)
    system.look()
    system.leave()  # it was told, and nobody can take that back
    assert system.group.started == [1, 1]
    system.sits()
    assert system.states == [State.UP]


def test_a_second_request_while_the_next_group_starts_waits_until_it_sits() -> None:
    system = System()
    system.watch.resize(2)
    system.look()
    system.leave()
    system.watch.resize(3)
    system.look()
    assert system.told == [("release_learner", 1)]
    system.sits()
    assert system.told == [("release_learner", 1), ("release_learner", 2)]
    system.leave()
    assert system.group.started == [1, 2, 3]


def test_a_learner_that_dies_after_it_was_asked_is_asked_again_in_its_successor() -> None:
    system = System()
    system.watch.resize(2)
    system.look()
    system.sits()
    assert system.told == [("release_learner", 1), ("release_learner", 2)]


def test_a_coordinator_that_was_started_again_is_told_again_when_it_knows_the_learner() -> None:
    system = System()
    system.watch.resize(2)
    system.look()
    session, system.session, system.leaves, system.processes = system.session, 0, False, ()
    system.look()
    assert len(system.told) == 1
    system.session = session
    system.look()
    assert system.told == [("release_learner", 1)] * 2
    assert system.states == [State.DRAINING]  # nobody has said otherwise


@pytest.mark.parametrize("how", ["stopping", "done"])
def test_a_group_that_has_nothing_more_to_do_is_not_started_again(how: str) -> None:
    system = System()
    system.watch.resize(2)
    system.look()
    if how == "stopping":
        system.stopping = True
    else:
        system.step = STEPS
    system.leave()
    assert system.group.started == [1]
    assert system.watch.finished()


def test_a_group_that_failed_ends_the_run_with_its_cause() -> None:
    system = System()
    system.group.state, system.group.cause = GroupStatus.FAILED, RunError("the learner failed: out of memory")
    assert refusal(RunError, system.look) == "the learner failed: out of memory"


def test_room_is_what_nodes_have_that_stay_and_with_cuda_a_gpu_for_each() -> None:
    nodes = [
        ClusterNode("a", {RESOURCE: 3, "GPU": 2}),
        ClusterNode("b", {RESOURCE: 2, "GPU": 8}, drains=True),
        ClusterNode("c", {"GPU": 4}),
        ClusterNode("d", {RESOURCE: 2}),
    ]
    assert learner_room(nodes, "cpu") == 3 + 2
    assert learner_room(nodes, "cuda") == 2


def test_an_elastic_group_starts_with_what_there_is_room_for_and_grows_without_a_loss() -> None:
    system = System(workers=1, most=3)
    assert system.group.started == [1]
    system.nodes.append(node("node-1"))
    system.look()
    assert system.told == [("release_learner", 1)]
    system.leave()
    assert (system.group.started, system.failures) == ([1, 2], [])
    system.sits()
    system.nodes += [node("node-2"), node("node-3")]
    system.look()
    system.leave()
    assert system.group.started == [1, 2, 3]  # and no more than the most


def test_an_elastic_group_that_lost_a_node_starts_on_what_is_left_after_a_while() -> None:
    system = System(workers=1, most=2, nodes=2)
    for _ in range(2):
        system.group.state, system.group.cause = GroupStatus.FAILED, RunError("the learner failed: node-1 is gone")
        system.look()
        assert system.states == [State.STARTING, State.STARTING]
        system.nodes = system.nodes[:1]
        system.look()
        if len(system.failures) == 2:
            assert system.group.started == [2, 1]  # two seconds later
            system.look()
    assert system.group.started == [2, 1, 1]
    assert system.failures == ["the learner failed: node-1 is gone"] * 2
    system.sits()
    assert system.states == [State.UP]


def test_below_the_fewest_it_waits_for_nodes() -> None:
    system = System(workers=2, most=3, nodes=2)
    system.group.state = GroupStatus.FAILED
    system.nodes = system.nodes[:1]
    for _ in range(5):
        system.look()
    assert system.group.started == [2]
    assert system.watch.finished()  # a run that is asked to stop now has nothing to wait for
    system.nodes.append(node("node-2"))
    system.look()
    assert system.group.started == [2, 2]


def test_a_group_leaves_a_node_that_is_about_to_go_where_there_is_room_elsewhere() -> None:
    system = System(workers=1, nodes=1)
    system.nodes = [node("node-0", drains=True)]
    system.look()
    assert system.told == []  # nowhere else: it works on until the node is gone
    system.nodes.append(node("node-1"))
    system.look()
    assert system.told == [("release_learner", 1)]
    system.leave()
    assert system.group.started == [1, 1]


def test_a_request_sets_the_most_of_an_elastic_group() -> None:
    system = System(workers=1, most=2, nodes=3)
    assert system.group.started == [2]
    system.watch.resize(3)
    system.look()
    system.leave()
    assert system.group.started == [2, 3]


def test_a_group_is_elastic_still_after_requests() -> None:
    system = System(workers=1, most=2, nodes=2)
    for wanted in (1, 2):
        system.watch.resize(wanted)
        system.look()
        system.leave()
        system.sits()
    assert system.group.started == [2, 1, 2]
    system.nodes[1] = node("node-1", drains=True)
    system.look()
    assert system.leaves
    system.leave()
    assert system.group.started == [2, 1, 2, 1]
    system.sits()
    system.group.state, system.group.cause = GroupStatus.FAILED, RunError("the learner failed: it was killed")
    system.look()
    assert system.failures == ["the learner failed: it was killed"]  # which ends no run
