"""How many processes of a run may be replaced before the run is ended."""

from collections import deque
from dataclasses import dataclass, field

from distrl.errors import RunError

LONGEST_DELAY_S = 30.0


@dataclass(slots=True)
class RestartBudget:
    """Counts restarts over a sliding window; a process that dies again and again is replaced more and more slowly.

    Args:
        limit: restarts within the window; see `limits.restarts`.
        window_s: see `limits.restart_window_s`.
        delay_s: before the second replacement of one process within the window; doubles with each further one.
    """

    limit: int
    window_s: float
    delay_s: float
    _spent: deque[tuple[float, str]] = field(default_factory=deque)
    total: int = 0

    def spend(self, slot: str, cause: str, now_s: float) -> float:
        """One more process is replaced; seconds to wait before.

        Args:
            slot: the place that the process fills, whatever process fills it.
        Raises:
            RunError: that is one too many.
        """
        while self._spent and self._spent[0][0] <= now_s - self.window_s:
            self._spent.popleft()
        self._spent.append((now_s, slot))
        self.total += 1
        if len(self._spent) > self.limit:
            raise RunError(
                f"limits.restarts: at most {self.limit} processes may be replaced within limits.restart_window_s = "
                f"{self.window_s:g} s, {slot} would be one more; it ended because: {cause}"
            )
        before = sum(1 for _, name in self._spent if name == slot) - 1
        return min(LONGEST_DELAY_S, self.delay_s * 2 ** (before - 1)) if before else 0.0
