"""What an engine is asked and what it answers: values only, no engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor  # the config imports this module, and the CLI must start without torch

FinishReason = Literal["stop", "length"]

UpdateMode = Literal["keep", "recompute"]
"""What new weights do to the keys and values of sequences in flight: stay, or are computed again."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The distribution that tokens are drawn from, and when a response ends."""

    max_new_tokens: int
    """Tokens after which a response is cut (finish reason "length"), >= 1."""
    temperature: float = 1.0
    """Divides the logits, > 0."""
    top_p: float = 1.0
    """Smallest set of most likely tokens whose probabilities reach top_p, in (0, 1]; 1 keeps all."""
    top_k: int = 0
    """Only the top_k most likely tokens are sampled; 0 keeps all. Applied before top_p, as in vLLM."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Several responses to one prompt; the work of one ticket."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    responses: int
    """How many responses to sample, >= 1."""
    params: SamplingParams
    stream: tuple[int, ...]
    """Names the random numbers (see `distrl.seeding.sampling_noise`): same stream, same noise."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One response. The three lists have one entry per sampled token, the end-of-sequence token included."""

    token_ids: list[int]
    logps: list[float]
    """Log-probability (nats) of each token under the distribution really sampled: after temperature, top-k, top-p."""
    versions: list[int]
    """Policy version whose weights gave each token's distribution; never decreases."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading new weights cost."""

    version: int
    pause_s: float
    """Seconds in which no token was sampled."""
    sequences_in_flight: int
    """Responses that go on under the new weights."""


@runtime_checkable
class Sleeper(Protocol):
    """An engine that can give its device's memory back for a while."""

    async def sleep(self) -> None:
        """Give back the memory of weights and cache; nothing may be in flight, and nothing is sampled until `wake`.

        Raises:
            StageError: requests are in flight; nothing has changed.
        """
        ...

    async def wake(self) -> None:
        """Take the memory again. Which weights the engine holds then is not said: load some before sampling."""
        ...


class Engine(Protocol):
    """Samples tokens from the weights it holds; many requests at once, new weights between two tokens."""

    @property
    def version(self) -> int:
        """Policy version of the weights that sample the next token."""
        ...

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def context_length(self) -> int:
        """Longest prompt plus response, in tokens."""
        ...

    async def sample(self, request: SampleRequest) -> list[Sample]:
        """The request's responses, in order of their index."""
        ...

    @property
    def loads_changes(self) -> bool:
        """Whether `load` takes some tensors alone; where it does not, all of them are fetched for every version."""
        ...

    async def load(self, version: int, tensors: Mapping[str, "Tensor"], *, changed_only: bool = False) -> LoadReport:
        """Replace weights between two decode steps; requests in flight are kept and go on.

        Args:
            changed_only: `tensors` may lack those that are the same as in the loaded version.
        Raises:
            PolicyError: a tensor is missing, unknown or misshapen; the old weights stay.
        """
        ...

    async def close(self) -> None: ...
