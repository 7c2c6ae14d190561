"""Raises an alert where what graders say shifts suddenly: a grader that broke looks like a policy that learned."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean, variance

SMALLEST = 0.05
"""Smallest shift that counts, as a share of the larger of the two means; where nothing varies, every shift would."""


class ShiftWatch:
    """Compares the newest tickets with those before them, quantity by quantity.

    With the means m and variances s2 of the last n tickets and of the n before, an alert is raised where

        |m_new - m_old| > sigmas * sqrt((s2_new + s2_old) / n)   and   |m_new - m_old| > 0.05 * max(|m_new|, |m_old|)

    The standard error takes tickets for independent. After an alert the comparison begins anew, so that a shift is told
    once. Drift that a policy learns slowly is no shift: it moves both windows.

    Args:
        tickets: n >= 2.
        sigmas: > 0.
        alert: told of each shift.
    """

    def __init__(self, tickets: int, sigmas: float, alert: Callable[[str], None]) -> None:
        self._tickets = tickets
        self._sigmas = sigmas
        self._alert = alert
        self._seen: dict[str, deque[float]] = {}

    def observe(self, quantities: Mapping[str, float]) -> None:
        """What was found of one ticket."""
        for name, value in quantities.items():
            seen = self._seen.setdefault(name, deque(maxlen=2 * self._tickets))
            seen.append(value)
            if len(seen) == 2 * self._tickets:
                self._compare(name, seen)

    def _compare(self, name: str, seen: deque[float]) -> None:
        values = list(seen)
        old, new = values[: self._tickets], values[self._tickets :]
        before, now = fmean(old), fmean(new)
        error = math.sqrt((variance(old) + variance(new)) / self._tickets)
        shift = abs(now - before)
        if shift > self._sigmas * error and shift > SMALLEST * max(abs(now), abs(before)):
            self._alert(
                f"{name} shifted from {before:.4g} to {now:.4g} between {self._tickets} tickets and the next "
                f"{self._tickets}; look at what graders gave, in the journal's columns components, verdict and reason"
            )
            seen.clear()
