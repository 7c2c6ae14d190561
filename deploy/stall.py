"""Says who is waiting for whom when nothing happens any more."""

from typing import Any


class StallWatch:
    """Compares snapshots of the coordinator.

    Args:
        warning_s: seconds without progress after which, and again after each further such span, there is a warning.
    """

    def __init__(self, warning_s: float) -> None:
        self._warning_s = warning_s
        self._last: object = None
        self._since_s: float | None = None
        self._next_s = 0.0

    def look(self, snapshot: dict[str, Any], now_s: float) -> str | None:
        """A warning that names the stage, the ticket and since when, or None.

        Progress is any rollout that finished a stage, and any step.
        """
        state = (snapshot["step"], snapshot["rollouts"], snapshot["tickets"])
        if state != self._last or self._since_s is None:
            self._last, self._since_s, self._next_s = state, now_s, now_s + self._warning_s
            return None
        if now_s < self._next_s:
            return None
        self._next_s = now_s + self._warning_s
        return f"no progress for {now_s - self._since_s:.0f} s: {where(snapshot)}"


def where(snapshot: dict[str, Any]) -> str:
    """Who is waited for, in words."""
    oldest = snapshot["oldest"]
    if oldest is not None:
        return f"ticket {oldest['ticket']} is in {oldest['stage']} for {oldest['since_s']:.0f} s"
    if snapshot["granted"]:
        return f"the learner works on {snapshot['granted']} tickets"
    if snapshot["learner_waiting"]:
        return "the learner waits, and no ticket is under way"
    return "the learner has not asked for a batch yet"
