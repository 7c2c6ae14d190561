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
