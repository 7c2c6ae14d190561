"""A text and an environment of a few lines, for tests that look at every token of an episode."""

from collections.abc import Callable, Sequence
from typing import Any

from actors.calls import LocalCaller
from actors.environments import EnvironmentHost
from actors.episodes import EpisodeLimits
from distrl.tasks import Message, Problem
from tests.builders import DEADLINE_S

PROBLEM = Problem.of("3>", "3")


class Letters:
    """Text of one letter per token; every observation is a letter that no message would be read back as: the tokens of
    a whole transcript are not those of its text."""

    def encode(self, prompt: str, messages: Sequence[Message] = ()) -> tuple[int, ...]:
        return (5, 6, 7)

    def observe(self, observation: str, chat: bool) -> tuple[int, ...]:
        return tuple(8 + int(digit) for digit in observation)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + i % 3) for i in token_ids)


class Scripted:
    """Observation 0, 1, 2, ... and a tenth of the turn's number as reward, until the last turn."""

    def __init__(self, turns: int, first: str = "") -> None:
        self._turns, self._first, self._turn = turns, first, 0
        self.messages: list[str] = []

    def reset(self, problem: Problem) -> str:
        return self._first

    def step(self, message: str) -> tuple[str, float, bool]:
        self.messages.append(message)
        self._turn += 1
        return str(self._turn % 10) * 2, self._turn / 10, self._turn == self._turns


def host(make: Callable[[], Any]) -> LocalCaller:
    return LocalCaller("environment-0", EnvironmentHost(make))


def limits(turns: int = 20, turn_tokens: int | None = None, timeout_s: float = DEADLINE_S) -> EpisodeLimits:
    return EpisodeLimits(turns, turn_tokens, timeout_s)
