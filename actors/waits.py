"""Who waits for whom, in seconds, from the times at which things happened."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Span = tuple[str, float, float]
"""(stage, start, end) in seconds."""


def blame(wait: tuple[float, float], timeline: Iterable[Span]) -> dict[str, float]:
    """How the seconds of a wait divide over the stages of the ticket that was waited for.

    What no stage covers is `issue`: the ticket did not exist yet, or lay between two stages.
    """
    start, end = wait
    shares: dict[str, float] = defaultdict(float)
    covered: list[tuple[float, float]] = []
    for stage, begin, finish in timeline:
        overlap = min(end, finish) - max(start, begin)
        if overlap > 0:
            shares[stage] += overlap
            covered.append((max(start, begin), min(end, finish)))
    uncovered = (end - start) - _union(covered)
    if uncovered > 1e-9:
        shares["issue"] += uncovered
    return dict(shares)


def _union(spans: list[tuple[float, float]]) -> float:
    total, reach = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total


@dataclass(slots=True)
class Stopwatch:
    """Adds up the time during which a condition held."""

    clock: Callable[[], float]
    total_s: float = 0.0
    _since: float | None = field(default=None)

    def set(self, holds: bool) -> None:
        now = self.clock()
        if self._since is not None:
            self.total_s += now - self._since
        self._since = now if holds else None

    @property
    def running(self) -> bool:
        return self._since is not None

    def read(self) -> float:
        return self.total_s + (self.clock() - self._since if self._since is not None else 0.0)


@dataclass(slots=True)
class WaitReport:
    """Seconds that the learner waited, by the stage it waited for, and that generation was held back."""

    learner_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, shares: dict[str, float]) -> None:
        for stage, seconds in shares.items():
            self.learner_s[stage] += seconds


@dataclass(slots=True)
class Activity:
    """What somebody does, and since when."""

    clock: Callable[[], float]
    what: str = "has not begun"
    _since: float | None = field(default=None)

    def begin(self, what: str) -> None:
        self.what, self._since = what, self.clock()

    def end(self, what: str, then: str) -> None:
        """`what` has ended; nothing changes where something else has begun meanwhile."""
        if self.what == what:
            self.begin(then)

    def report(self) -> dict[str, object]:
        return {"does": self.what, "since_s": None if self._since is None else self.clock() - self._since}
