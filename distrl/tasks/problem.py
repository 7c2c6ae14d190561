"""What a task consists of."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt, and what a grader needs to judge a response to it.

    Example:
        Problem.of("31>", "13")
    """

    prompt_id: str
    """Names the content: the same prompt and answer have the same id in every run and process."""
    prompt: str
    """Text that the model continues."""
    answer: str
    """Reference answer; empty where the grader needs none."""
    metadata: Mapping[str, object] = field(default_factory=dict)
    """What else the grader needs; survives a round trip through JSON."""

    @classmethod
    def of(cls, prompt: str, answer: str, metadata: Mapping[str, object] | None = None) -> "Problem":
        """A problem with the id of its content."""
        content = json.dumps([prompt, answer])
        return cls(hashlib.sha256(content.encode()).hexdigest()[:16], prompt, answer, metadata or {})


class Dataset(Protocol):
    """Problems by index; the same index is always the same problem. Problems may be made when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Problem: ...


@dataclass(frozen=True, slots=True)
class Task:
    """Problems to train on and problems to measure on; no prompt is in both."""

    train: Dataset
    heldout: tuple[Problem, ...]
    """Distinct problems that are never trained on."""
    default_reward: str
    """Name of the grader that fits the answers, see `distrl.rewards`."""


def content_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
