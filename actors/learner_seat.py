"""Which learner process the coordinator listens to: the one that sat down last."""

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

    def sit(self, where: Whereabouts) -> int:
        """A learner process begins; the session that its calls carry from now on."""
        self.session = max(self.session, where.started_ns) + 1
        self.starts += 1
        self.where = where
        return self.session

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
        return {"starts": self.starts, "where": self.where}
