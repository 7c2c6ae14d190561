"""A model small enough to run hundreds of times in a test, and what one asks it."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.engines.transformers import TransformersEngine
from distrl.sampling import SampleRequest, SamplingParams, UpdateMode

VOCABULARY = 23
"""Odd, so that rows of logits do not begin at multiples of a vector register."""
CONTEXT = 64
EOS = 1
PAD = 0


def tiny_model(seed: int = 0, **config: int | bool) -> Qwen3ForCausalLM:
    """A Qwen3 with weights large enough for its distributions to differ from token to token."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 51,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**{**sizes, **config})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_engine(
    model: torch.nn.Module | None = None,
    *,
    eos_token_ids: Sequence[int] = (EOS,),
    slots: int = 8,
    update_mode: UpdateMode = "keep",
    on_step: Callable[[int], None] | None = None,
) -> TransformersEngine:
    return TransformersEngine(
        model or tiny_model(),
        eos_token_ids=eos_token_ids,
        pad_token_id=PAD,
        slots=slots,
        threads=1,
        update_mode=update_mode,
        on_step=on_step,
    )


def request(
    name: str = "r",
    prompt: Sequence[int] = (5, 6, 7),
    responses: int = 2,
    *,
    max_new_tokens: int = 6,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stream: int = 0,
) -> SampleRequest:
    params = SamplingParams(max_new_tokens, temperature, top_p, top_k)
    return SampleRequest(name, tuple(prompt), responses, params, (0, 1, stream, 0))


def full_logps(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """[T, V] log-probabilities before each token of the response, by one plain forward pass without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


class StepGate:
    """Stops the decode thread after one of its steps until a test lets it go on."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._reached = threading.Event()
        self._go_on = threading.Event()
        self.steps = 0

    def __call__(self, step: int) -> None:
        self.steps = step
        if step == self._step:
            self._reached.set()
            assert self._go_on.wait(10), "the test never opened the gate"

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, 10), "the engine never came to the gate"

    def open(self) -> None:
        self._go_on.set()
