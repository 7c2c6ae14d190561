"""The learner's group while the run runs: how many workers it has, and how it gets another number of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.nodes import ClusterNode, learner_room
from deploy.supervisor import State, Tell
from distrl.config_sections import TrainConfig
from distrl.errors import RunError
from distrl.messages import Whereabouts
from learners.group import GroupStatus, LearnerGroup


@dataclass(slots=True)
class Size:
    """How many workers there are to be: `most` of them, and in an elastic group at least `least`."""

    least: int
    most: int
    device: str
    elastic: bool = field(init=False)
    """For good, whatever is asked for later."""
    _fewest: int = field(init=False)
    """Of the config."""

    def __post_init__(self) -> None:
        self.elastic, self._fewest = self.least < self.most, self.least

    @classmethod
    def of(cls, train: TrainConfig) -> "Size":
        return cls(train.workers, train.max_workers or train.workers, train.device)

    def resize(self, workers: int) -> None:
        """Somebody asks for so many."""
        self.least = min(self._fewest, workers) if self.elastic else workers
        self.most = workers

    def among(self, nodes: Sequence[ClusterNode]) -> int:
        """Workers to start on these nodes; 0 where there is not room for the fewest of an elastic group."""
        if not self.elastic:
            return self.most  # Ray waits for the room
        room = min(self.most, learner_room(nodes, self.device))
        return room if room >= self.least else 0


class LearnerWatch:
    """Starts the group, and again with another number of workers: nothing is lost, and nothing trained twice.

    A group that is asked to leave finishes its step, makes a checkpoint and ends; the next one goes on from it, on the
    weights that are published. It is asked where another number is wanted, where an elastic group could have more
    workers, and where one of its nodes is about to go. What is asked is compared with what there is at every look, so
    that neither a coordinator nor a learner that dies meanwhile is in the way.

    An elastic group whose workers are lost ends, and another one starts on the nodes that are left, from the last
    checkpoint. (Ray Train's own elastic policy sees nodes 20 s late, counts those that go, and loses the steps since
    the checkpoint also where a node is only added.)

    Args:
        tell: to the coordinator.
        ended: called when a group has ended because it was asked to, which is no failure of its process.
        failed: called with the cause when an elastic group has failed; gives seconds to wait before the next one.
        steps: of the run.
    """

    def __init__(
        self,
        group: LearnerGroup,
        tell: Tell,
        ended: Callable[[], object],
        failed: Callable[[str], float],
        size: Size,
        steps: int,
    ) -> None:
        self._group = group
        self._tell = tell
        self._ended = ended
        self._failed = failed
        self._steps = steps
        self._wanted = size
        self._size = 0
        self._begins_s: float | None = None
        """When the next group begins, where there is none; by the caller's clock."""
        self._where: Sequence[Whereabouts] = ()
        self._left: Sequence[Whereabouts] = ()

    def start(self, nodes: Sequence[ClusterNode]) -> None:
        self._begins_s = 0.0
        self._begin(nodes, 0.0)

    def resize(self, workers: int) -> None:
        """From now on there are to be so many workers, or at most so many in an elastic group."""
        self._wanted.resize(workers)

    def look(self, snapshot: Mapping[str, Any], nodes: Sequence[ClusterNode], now_s: float) -> None:
        """Brings the group and what is wanted together.

        Raises:
            RunError: the group has failed, and too often where it is elastic.
        """
        learner = snapshot["learner"]
        # A coordinator that was started again has not been told by a learner that lives.
        self._where = learner["workers"] or self._where
        if self._begins_s is not None:
            self._begin(nodes, now_s)
            return
        match self._group.status():
            case GroupStatus.FAILED:
                self._fail(now_s)
            case GroupStatus.FINISHED:
                if self._has_more_to_do(snapshot):
                    self._ended()
                    self._left, self._begins_s = self._where, now_s
                    self._begin(nodes, now_s)
            case _:
                if learner["session"] and not learner["leaves"] and self._must_leave(learner["workers"], nodes):
                    self._tell("release_learner", learner["session"])

    def _begin(self, nodes: Sequence[ClusterNode], now_s: float) -> None:
        workers = self._wanted.among(nodes)
        if self._begins_s is not None and now_s >= self._begins_s and workers:
            self._size, self._begins_s = workers, None
            self._group.start(workers)

    def _fail(self, now_s: float) -> None:
        error = self._group.error() or RunError("the learner failed")
        if not self._wanted.elastic:
            raise error
        self._left = self._where
        self._begins_s = now_s + self._failed(str(error))

    def _must_leave(self, workers: Sequence[Whereabouts], nodes: Sequence[ClusterNode]) -> bool:
        wanted = self._wanted.among(nodes)
        if wanted and wanted != self._size:
            return True
        goes = {node.node_id for node in nodes if node.drains}
        # Where there is no room elsewhere, work goes on until the node is gone.
        return any(w.node in goes for w in workers) and learner_room(nodes, self._wanted.device) >= self._wanted.least

    def _has_more_to_do(self, snapshot: Mapping[str, Any]) -> bool:
        return not (snapshot["stopping"] or snapshot["done"]) and snapshot["step"] < self._steps

    def finished(self) -> bool:
        """Whether the group has ended, or none has begun; what it did is in a checkpoint."""
        return self._begins_s is not None or self._group.status() == GroupStatus.FINISHED

    def workers(self, nodes: Sequence[ClusterNode] = ()) -> list[tuple[Whereabouts, State]]:
        """The workers' processes in the order of their ranks; those that were there last, until others are."""
        if self._where == self._left:
            state = State.STARTING
        else:
            state = State.DRAINING if self._must_leave(self._where, nodes) else State.UP
        return [(where, state) for where in self._where]
