"""The learner's group under requests, deaths and stops that a test plays."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from deploy.learner_watch import LearnerWatch
from deploy.supervisor import State
from distrl.errors import RunError
from distrl.messages import Whereabouts
from learners.group import GroupStatus
from tests.builders import refusal

STEPS = 10


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

    def __init__(self, workers: int = 1) -> None:
        self.group = FakeGroup()
        self.told: list[tuple[str, int]] = []
        self.ended = 0
        self.step = 3
        self.stopping = False
        self.session, self.leaves = 0, False
        self.processes: tuple[Whereabouts, ...] = ()
        self.watch = LearnerWatch(self.group, self._tell, self._end, workers, STEPS)
        self.watch.start()
        self.sits()

    def _tell(self, method: str, *arguments: Any) -> None:
        self.told.append((method, *arguments))
        self.leaves |= arguments == (self.session,)

    def _end(self) -> None:
        self.ended += 1

    def sits(self) -> None:
        """Processes of the group that was started last begin."""
        self.session, self.leaves = self.session + 1, False
        count = self.group.started[-1]
        self.processes = tuple(Whereabouts(100 * self.session + i, "here", "node", 0) for i in range(count))
        self.look()

    def leave(self) -> None:
        self.group.state = GroupStatus.FINISHED
        self.look()

    def look(self) -> None:
        learner = {"workers": self.processes, "session": self.session, "leaves": self.leaves}
        self.watch.look({"learner": learner, "stopping": self.stopping, "done": False, "step": self.step})

    @property
    def states(self) -> list[State]:
        return [state for _, state in self.watch.workers()]


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
