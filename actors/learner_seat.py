"""Which learner process the coordinator listens to: the one that sat down last."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distrl.errors import RunError
from distrl.messages import Whereabouts


@dataclass(slots=True)
class LearnerSeat:
    """A learner that is replaced may still have calls under way; they must change nothing any more."""

    session: int = 0
    """Of the process that sits here; a call without a session is not checked."""
    starts: int = 0
    where: Whereabouts | None = None
    workers: tuple[Whereabouts, ...] = ()
    """All processes of the group that sits here, the one that speaks first."""
    asked_to_leave: int = 0
    """Session of the learner that was asked to; the next one may stay."""
    left: bool = False
    """It was told that it has nothing more to do: it makes a checkpoint of all that it did, and ends."""

    def sit(self, where: Whereabouts, workers: Sequence[Whereabouts] = ()) -> int:
        """A learner process begins; the session that its calls carry from now on.

        Args:
            workers: all processes of its group in the order of their ranks; empty where it is the only one.
        """
        self.session = max(self.session, where.started_ns) + 1
        self.starts += 1
        self.where = where
        self.workers = tuple(workers) or (where,)
        self.left = False
        return self.session

    def ask_to_leave(self, session: int) -> bool:
        """Whether the learner of this session sits here and was not asked before."""
        if session != self.session or session == self.asked_to_leave:
            return False
        self.asked_to_leave = session
        return True

    def must_leave(self, session: int | None) -> bool:
        """Whether a learner that asks for a batch is to leave instead."""
        return session is not None and session == self.asked_to_leave

    def check(self, session: int | None) -> None:
        """Lets a call through; after a restart of the coordinator also the first one of a learner that lives.

        Raises:
            RunError: another learner process has begun since.
        """
        if session is None:
            return
        if session < self.session:
            raise RunError("this learner process was replaced by another one and must end")
        self.session = session

    def report(self) -> dict[str, Any]:
        return {
            "starts": self.starts,
            "where": self.where,
            "workers": self.workers,
            "session": self.session,
            "leaves": self.session == self.asked_to_leave,
        }
