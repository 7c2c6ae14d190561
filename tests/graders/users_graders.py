"""Graders as users write them, imported by name in this process and in others."""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from distrl.rewards import Grade
from distrl.tasks import Problem


def plain(response: str, answer: str, metadata: Mapping[str, object]) -> float:
    return float(answer in response)


async def plain_async(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    await asyncio.sleep(0)
    return Grade(2.0 * float(answer in response), verdict="correct")


def trl(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    return [float(a in c) for a, c in zip(answer, completions, strict=True)]


async def trl_async(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(a in c) for a, c in zip(answer, completions, strict=True)]


def verifiers_function(completion: str, answer: str, state: dict[str, Any]) -> float:
    assert state["answer"] == answer
    return float(answer in completion)


def chat_content(completion: list[dict[str, str]], answer: str, info: dict[str, Any], **kwargs: Any) -> float:
    return float(completion[-1]["content"] == answer) * float(info["level"])


async def async_length(completion: str) -> float:
    await asyncio.sleep(0)
    return float(len(completion))


class Rubric:
    """The face of `verifiers.Rubric` that scoring needs."""

    def __init__(self) -> None:
        self.funcs = [verifiers_function, async_length]
        self.weights = [1.0, 0.5]
        self.class_objects = {"parser": None}


def reasoning_gym_scorer(answer: str | None, entry: dict[str, Any]) -> float:
    return float(answer == entry["answer"]) * 0.5


class Dataset:
    """The face of a reasoning-gym data set that scoring needs."""

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        return float(answer == entry["answer"])


DATASET = Dataset()


def arrow_in_any_order(problems: Sequence[Problem], responses: Sequence[str]) -> pa.RecordBatch:
    """The last row first, and the first one twice."""
    rows = [*reversed(range(len(responses))), 0]
    return pa.RecordBatch.from_pydict(
        {
            "row": rows,
            "reward": [float(responses[row]) for row in rows],
            "reason": [f"row {row}" for row in rows],
            "verdict": ["wrong"] * len(rows),
        }
    )


def arrow_that_contradicts_itself(problems: Sequence[Problem], responses: Sequence[str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"row": [0, 0], "reward": [0.0, 1.0]})


def arrow_that_leaves_one_out(problems: Sequence[Problem], responses: Sequence[str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"row": [0], "reward": [0.0]})


class Scaled:
    """A class with an option."""

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def __call__(self, response: str, answer: str, metadata: Mapping[str, object]) -> float:
        return self._factor * float(response)


def scaled(response: str, answer: str, metadata: Mapping[str, object], factor: float = 1.0) -> float:
    return factor * float(response)


def process(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    """Does what the response says; a reward is the number of the process."""
    if response == "hang":
        time.sleep(10**6)
    if response == "die":
        os._exit(3)
    if response == "grow":
        return Grade(float(len(bytearray(1 << 40))))
    return Grade(float(os.getpid()), {}, "correct")
