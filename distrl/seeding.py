"""Random numbers that depend on what they are for, never on who draws them or when.

Every stream is named by integers (run seed, purpose, ticket, ...), so a ticket that is sampled again, by another
process or after a restart, meets the same noise.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What a stream of random numbers is for; two purposes never share numbers."""

    SAMPLING = 1
    EVALUATION = 2
    PROMPT_ORDER = 3
    TASK = 4
    MODEL = 5
    WARMUP = 6
    REFERENCE_SAMPLING = 7
    OPPONENT = 8


def generator(seed: int, purpose: Purpose, *words: int) -> np.random.Generator:
    """A counter-based (Philox) generator for one stream.

    Args:
        seed: the run's seed, >= 0.
        words: further non-negative integers that name the stream, such as (ticket, redraw).
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, int(purpose), *words])))


def sampling_noise(stream: tuple[int, ...], responses: int, tokens: int) -> NDArray[np.float64]:
    """Uniform numbers that choose the tokens of one ticket.

    Args:
        stream: non-negative integers that name the stream: (seed, purpose, ticket, redraw).
    Returns:
        [responses, tokens] in [0, 1); number t of response g decides its token t by inverse-CDF sampling.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(stream))))
    return rng.random((responses, tokens))


def response_seeds(stream: tuple[int, ...], responses: int) -> list[int]:
    """One seed per response of a ticket, for engines that draw their own random numbers.

    Args:
        stream: as in `sampling_noise`.
    Returns:
        Integers in [0, 2**63); seed g does not depend on the number of responses.
    """
    words = np.random.SeedSequence(list(stream)).generate_state(responses, np.uint64)
    return [int(word >> np.uint64(1)) for word in words]
