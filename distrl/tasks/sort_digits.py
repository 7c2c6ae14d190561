"""Sort digits: a task that a model of a million parameters learns in seconds, so that a whole run fits in minutes.

    prompt "31415926>"   answer "11234569"

A problem is held out when a hash of its *sorted* digits says so. The splits are disjoint by construction, for every
seed, and no permutation of a held-out problem is trained on either.
"""

from distrl.errors import ConfigError, DataError
from distrl.seeding import Purpose, generator
from distrl.tasks.config import DataConfig
from distrl.tasks.problem import Problem, Task, content_hash

ALPHABET = "0123456789>"
"""Every character of the task, for `distrl.tokenizer.character_tokenizer`."""

_ONE_IN = 10  # One multiset of digits in ten is held out.
_TRAIN, _HELDOUT = 0, 1
_MOST_DIGITS = 64


def is_held_out(answer: str) -> bool:
    """Whether problems with these sorted digits belong to the held-out split."""
    return content_hash(answer) % _ONE_IN == 0


class SortDigits:
    """Training problems, made when they are asked for from (seed, index).

    Args:
        digits: length of a prompt, >= 2; with fewer a split could be empty.
        size: how many problems there are.
        seed: >= 0.
    """

    def __init__(self, digits: int, size: int, seed: int) -> None:
        self._digits = digits
        self._size = size
        self._seed = seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int, /) -> Problem:
        if not 0 <= index < self._size:
            raise IndexError(f"problem index must be in [0, {self._size}), got {index}")
        return _draw(self._digits, self._seed, _TRAIN, index)


def load_sort_digits(config: DataConfig) -> Task:
    """The task that sorts `options.digits` digits.

    Raises:
        ConfigError: an option is unknown or out of range.
        DataError: there are fewer distinct held-out problems than asked for.
    """
    digits = _digits(config.options or {})
    seed = config.seed or 0
    heldout = _heldout(digits, seed, config.heldout_size or 1024)
    return Task(SortDigits(digits, config.train_size or 100_000, seed), heldout, "exact")


def _digits(options: dict[str, object]) -> int:
    for key in options:
        if key != "digits":
            raise ConfigError(
                f"data.options.{key} is not an option of sort_digits, got {options[key]!r}; the only one is digits"
            )
    digits = options.get("digits", 8)
    if not isinstance(digits, int) or isinstance(digits, bool) or not 2 <= digits <= _MOST_DIGITS:
        raise ConfigError(
            f"data.options.digits must be an integer from 2 to {_MOST_DIGITS}, got {digits!r}; 8 is the default"
        )
    return digits


def _draw(digits: int, seed: int, split: int, index: int) -> Problem:
    rng = generator(seed, Purpose.TASK, digits, split, index)
    while True:
        text = "".join(map(str, rng.integers(10, size=digits)))
        answer = "".join(sorted(text))
        if is_held_out(answer) == (split == _HELDOUT):
            return Problem.of(f"{text}>", answer)


def _heldout(digits: int, seed: int, size: int) -> tuple[Problem, ...]:
    distinct: dict[str, Problem] = {}
    # Twenty draws for each problem: enough unless nearly all that exist are asked for.
    for index in range(20 * size):
        problem = _draw(digits, seed, _HELDOUT, index)
        distinct.setdefault(problem.prompt, problem)
        if len(distinct) == size:
            return tuple(distinct.values())
    raise DataError(
        f"data.heldout_size must be at most the number of distinct held-out problems, got {size} but {digits} "
        f"digits gave only {len(distinct)} in {20 * size} draws; lower it or raise data.options.digits"
    )
