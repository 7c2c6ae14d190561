"""Which problem a draw of the training set is."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from distrl.seeding import Purpose, generator


def prompt_index(seed: int, draw: int, size: int) -> int:
    """Index of the problem that draw number `draw` takes; a function of its arguments alone.

    Draws 0 to size - 1 are a permutation of the training set, the next `size` draws another one, and so on.

    Args:
        seed: the run's seed, >= 0.
        draw: number of the draw since the run began, >= 0.
        size: problems in the training set, >= 1.
    """
    epoch, position = divmod(draw, size)
    return int(_permutation(seed, epoch, size)[position])


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    # Draws come in order, so that one epoch and its neighbor are all that is asked for at any time.
    return generator(seed, Purpose.PROMPT_ORDER, epoch).permutation(size)
