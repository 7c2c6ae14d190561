"""What a task consists of."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """Such as `system`, `user` or `assistant`; which ones exist is up to the model's chat template."""
    content: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt, and what a grader needs to judge a response to it.

    Example:
        Problem.of("31>", "13")
        Problem.of([Message("user", "Sort 31.")], "13")
    """

    prompt_id: str
    """Names the content: the same prompt, answer and metadata have the same id in every run and process."""
    prompt: str
    """Text that the model continues; of a conversation, its messages as JSON."""
    answer: str
    """Reference answer; empty where the grader needs none."""
    metadata: Mapping[str, object] = field(default_factory=dict)
    """What else the grader needs; survives a round trip through JSON."""
    messages: tuple[Message, ...] = ()
    """The conversation that the model goes on with, through its chat template; empty where the prompt is plain text."""

    @classmethod
    def of(
        cls, prompt: str | Sequence[Message], answer: str, metadata: Mapping[str, object] | None = None
    ) -> "Problem":
        """A problem with the id of its content."""
        content = json.dumps([prompt, answer, *([metadata] if metadata else [])])
        prompt_id = hashlib.sha256(content.encode()).hexdigest()[:16]
        if isinstance(prompt, str):
            return cls(prompt_id, prompt, answer, metadata or {})
        text = json.dumps([message._asdict() for message in prompt], ensure_ascii=False)
        return cls(prompt_id, text, answer, metadata or {}, tuple(prompt))


class Dataset(Protocol):
    """Problems by index; the same index is always the same problem. Problems may be made when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Problem: ...


@dataclass(frozen=True, slots=True)
class Task:
    """Problems to train on and problems to measure on; no prompt is in both."""

    train: Dataset
    """A tuple where all problems are in memory."""
    heldout: tuple[Problem, ...]
    """Distinct problems that are never trained on."""
    default_reward: str
    """Name of the grader that fits the answers, see `distrl.rewards`."""

    def map(self, change: Callable[[Problem], Problem]) -> "Task":
        """The task with every problem changed; problems that are made when asked for stay so."""
        train = tuple(map(change, self.train)) if isinstance(self.train, tuple) else _Mapped(self.train, change)
        return replace(self, train=train, heldout=tuple(map(change, self.heldout)))

    def in_memory(self) -> "Task":
        """The task with all its training problems made at once."""
        return replace(self, train=tuple(self.train[i] for i in range(len(self.train))))

    def without(self, prompt_ids: frozenset[str]) -> "Task":
        """The task without the problems of these ids, in the same order; of a training set that is not in memory
        none is left out."""
        if not prompt_ids:
            return self
        train = self.train
        if isinstance(train, tuple):
            train = tuple(p for p in train if p.prompt_id not in prompt_ids)
        return replace(self, train=train, heldout=tuple(p for p in self.heldout if p.prompt_id not in prompt_ids))


@dataclass(frozen=True, slots=True)
class _Mapped:
    """A dataset whose problems are changed as they are asked for."""

    problems: Dataset
    change: Callable[[Problem], Problem]

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int, /) -> Problem:
        return self.change(self.problems[index])


def content_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
