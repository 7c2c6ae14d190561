"""Graders that are slow on purpose."""

import time
from collections.abc import Mapping

from distrl.rewards import Grade, exact

GROUP_SIZE = 16
"""Responses per ticket in the benchmarks that use these graders."""


def one_second_per_ticket(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    """`exact`, and a second for the responses of one ticket together."""
    time.sleep(1.0 / GROUP_SIZE)
    return exact(response, answer, metadata)


def plus_or_minus(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    """`exact` with rewards in {-1, 1}: a wrong response is pushed down where nothing is subtracted."""
    grade = exact(response, answer, metadata)
    reward = 2.0 * grade.reward - 1.0
    return Grade(reward, {"exact": grade.reward}, grade.verdict, grade.reason)
