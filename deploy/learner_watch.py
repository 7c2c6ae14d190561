"""The learner's group while the run runs: how many workers it has, and how it gets another number of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deploy.supervisor import State, Tell
from distrl.errors import RunError
from distrl.messages import Whereabouts
from learners.group import GroupStatus, LearnerGroup


class LearnerWatch:
    """Starts the group, and again with another number of workers: nothing is lost, and nothing trained twice.

    A group that is asked to leave finishes its step, makes a checkpoint and ends; the next one goes on from it, on the
    weights that are published. What is asked is compared with what there is at every look, so that neither a
    coordinator nor a learner that dies meanwhile is in the way.

    Args:
        tell: to the coordinator.
        ended: called when a group has ended because it was asked to, which is no failure of its process.
        workers: to begin with.
        steps: of the run.
    """

    def __init__(self, group: LearnerGroup, tell: Tell, ended: Callable[[], object], workers: int, steps: int) -> None:
        self._group = group
        self._tell = tell
        self._ended = ended
        self._steps = steps
        self._wanted = self._size = workers
        self._where: Sequence[Whereabouts] = ()
        self._left: Sequence[Whereabouts] = ()

    def start(self) -> None:
        self._group.start(self._size)

    def resize(self, workers: int) -> None:
        """From now on there are to be so many workers."""
        self._wanted = workers

    def look(self, snapshot: Mapping[str, Any]) -> None:
        """Brings the group and what is wanted together.

        Raises:
            RunError: the group has failed.
        """
        learner = snapshot["learner"]
        # A coordinator that was started again has not been told by a learner that lives.
        self._where = learner["workers"] or self._where
        status = self._group.status()
        if status == GroupStatus.FAILED:
            raise self._group.error() or RunError("the learner failed")
        if status == GroupStatus.FINISHED and self._has_more_to_do(snapshot):
            self._ended()
            self._left, self._size = self._where, self._wanted
            self._group.start(self._size)
        elif self._wanted != self._size and learner["session"] and not learner["leaves"]:
            self._tell("release_learner", learner["session"])

    def _has_more_to_do(self, snapshot: Mapping[str, Any]) -> bool:
        return not (snapshot["stopping"] or snapshot["done"]) and snapshot["step"] < self._steps

    def finished(self) -> bool:
        """Whether the group has ended; what it did is in a checkpoint."""
        return self._group.status() == GroupStatus.FINISHED

    def workers(self) -> list[tuple[Whereabouts, State]]:
        """The workers' processes in the order of their ranks; those that were there last, until others are."""
        if self._where == self._left:
            state = State.STARTING
        else:
            state = State.UP if self._wanted == self._size else State.DRAINING
        return [(where, state) for where in self._where]
