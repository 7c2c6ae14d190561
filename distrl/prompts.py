"""Prompts as tokens, and which of them are too long. Needs a tokenizer, but no torch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from distrl.errors import ConfigError, DataError
from distrl.tasks.problem import Message, Problem, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1024
_STAND_IN = "stand-in"
_LOOKED_AT = 1000
"""Problems that are measured of a training set that is made while the run goes on."""


class PromptEncoder:
    """Turns prompts into tokens as generation does: a text with the tokenizer's special tokens, a conversation by the
    chat template, which brings its own.

    Args:
        setting: dotted name of the config key that the tokenizer came from, for messages.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, setting: str = "model.path") -> None:
        self._tokenizer: Any = tokenizer
        self._setting = setting

    def check_template(self) -> None:
        """Refuses a tokenizer without a chat template.

        Raises:
            ConfigError: it has none.
        """
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"data.chat_template model needs a tokenizer with a chat template, got {self._setting} "
                f"{str(self._tokenizer.name_or_path)!r} without one; set data.chat_template to none, or put the "
                "template into its chat_template.jinja"
            )

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to where the model is to begin its answer.

        Raises:
            DataError: the template refuses the conversation.
        """
        from jinja2 import TemplateError

        self.check_template()
        turns = [message._asdict() for message in messages]
        try:
            return str(self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise DataError(
                f"{self._setting}: the chat template must accept every conversation, got one with the roles {roles}: "
                f"{error}; change the messages or the template"
            ) from error

    def encode(self, prompt: str, messages: Sequence[Message] = ()) -> tuple[int, ...]:
        """Token ids of a prompt.

        Raises:
            DataError: see `render`.
        """
        if messages:
            return tuple(self._tokenizer.encode(self.render(messages), add_special_tokens=False))
        return tuple(self._tokenizer.encode(prompt))

    def observation(self, text: str, role: str, *, chat: bool) -> tuple[int, ...]:
        """Token ids of what an environment says after a message of the model, up to where the model speaks again.

        Of a conversation these are the tokens that the chat template puts between the end of one message and the
        beginning of the next, with the observation in them; the messages themselves keep the tokens they were sampled
        as. The end-of-sequence token belongs to the message.

        Raises:
            DataError: the template changes earlier messages when one is added, or refuses the conversation.
        """
        if not chat:
            return tuple(self._tokenizer.encode(text, add_special_tokens=False))
        before = [Message("user", _STAND_IN), Message("assistant", _STAND_IN)]
        turns = [message._asdict() for message in before]
        said = str(self._tokenizer.apply_chat_template(turns, tokenize=False))
        whole = self.render([*before, Message(role, text)])
        end = self._tokenizer.eos_token
        head, found, rest = said.rpartition(_STAND_IN)
        if not found or not whole.startswith(head + _STAND_IN) or not rest.startswith(end or ""):
            raise DataError(
                f"{self._setting}: the chat template must go on after a message of the model with its end of sequence "
                f"{end!r}, got {rest!r}; use a template that keeps earlier messages as they are"
            )
        return tuple(self._tokenizer.encode(whole[len(head + _STAND_IN + (end or "")) :], add_special_tokens=False))

    def lengths(self, problems: Iterable[Problem]) -> Iterator[tuple[Problem, int]]:
        """Each problem with the tokens of its prompt; in batches, so that a large file takes seconds.

        Raises:
            DataError: a prompt cannot be encoded.
        """
        remaining = iter(problems)
        while batch := list(islice(remaining, _BATCH)):
            for chat in (False, True):
                some = [p for p in batch if bool(p.messages) == chat]
                texts = [self.render(p.messages) if chat else p.prompt for p in some]
                yield from zip(some, self._count(texts, special=not chat), strict=True)

    def _count(self, texts: list[str], *, special: bool) -> list[int]:
        if not texts:
            return []
        try:
            # verbose: no remark on prompts beyond the model's context, which are an error or left out here.
            rows = self._tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        except Exception as error:
            for text in texts:
                self._check_encodes(text)
            raise DataError(f"{self._setting}: the tokenizer must encode every prompt, got {error}") from error
        return [len(ids) for ids in rows["input_ids"]]

    def _check_encodes(self, text: str) -> None:
        """Raises DataError where this is the prompt that the tokenizer cannot encode."""
        try:
            self._tokenizer.encode(text)
        except Exception as error:
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise DataError(
                f"{self._setting}: the tokenizer must encode every prompt, got {shown!r}: {error}; use a model whose "
                "tokenizer knows these characters"
            ) from error


@dataclass(frozen=True, slots=True)
class Lengths:
    """What measuring the prompts gave."""

    left_out: frozenset[str]
    """Prompt ids of problems that are longer than `data.max_prompt_tokens`; see `distrl.tasks.Task.without`."""
    longest: int
    """Tokens of the longest prompt that stays."""


def check_lengths(
    task: Task, encoder: PromptEncoder, *, max_prompt_tokens: int | None, max_new_tokens: int, context_length: int
) -> Lengths:
    """Measures the prompts, and refuses those that leave no room for a response.

    All held-out problems are measured, and all training problems that are in memory; of others the first 1,000.

    Args:
        max_prompt_tokens: longer prompts are to be left out; None leaves out none.
        max_new_tokens: longest response, >= 1.
        context_length: the model's longest sequence.
    Raises:
        ConfigError: a prompt that stays and its response may be longer than the context, or none stays.
        DataError: a prompt cannot be encoded.
    """
    room = context_length - max_new_tokens
    if room < 1:
        raise ConfigError(
            f"rollout.max_new_tokens must leave room for a prompt in the model's context of {context_length} tokens, "
            f"got {max_new_tokens}; lower it"
        )
    left_out: set[str] = set()
    shortest = longest = measured = too_long = 0
    for split in (_measurable(task), task.heldout):
        kept = 0
        shortest = 0
        for problem, tokens in encoder.lengths(split):
            shortest = min(shortest or tokens, tokens)
            if max_prompt_tokens is not None and tokens > max_prompt_tokens:
                left_out.add(problem.prompt_id)
                continue
            kept += 1
            measured += 1
            longest = max(longest, tokens)
            too_long += tokens > room
        if not kept:
            which = "held-out" if split is task.heldout else "training"
            raise ConfigError(
                f"data.max_prompt_tokens must leave a {which} problem, got {max_prompt_tokens} but the shortest prompt "
                f"has {shortest} tokens; raise it"
            )
    if too_long:
        remedy = f"set data.max_prompt_tokens to {room} to leave them out, or " if isinstance(task.train, tuple) else ""
        raise ConfigError(
            f"rollout.max_new_tokens: a prompt and its response must fit into the model's context of {context_length} "
            f"tokens, got {too_long} of {measured} prompts that do not, the longest of {longest} tokens + "
            f"{max_new_tokens}; {remedy}lower rollout.max_new_tokens"
        )
    return Lengths(frozenset(left_out), longest)


def _measurable(task: Task) -> Iterable[Problem]:
    if isinstance(task.train, tuple):
        return task.train
    return (task.train[i] for i in range(min(_LOOKED_AT, len(task.train))))
