"""One vLLM for all tests of a session: starting it takes most of a minute, resetting its weights milliseconds."""

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import Qwen3ForCausalLM

from actors.engines.vllm import VllmEngine
from actors.engines.vllm_start import start_vllm
from distrl.sampling import LoadReport, Sample, SampleRequest, UpdateMode
from distrl.weights import policy_tensors
from tests.engines.tiny import CONTEXT, EOS, VOCABULARY, request, tiny_model

T = TypeVar("T")

BLOCK = 32
"""Tokens of a block of vLLM's cache; only whole blocks of a prompt are found again."""


def model(seed: int = 0) -> Qwen3ForCausalLM:
    """A tiny model with heads that vLLM's attention on a CPU can compute."""
    return tiny_model(seed, head_dim=32)


class SharedVllm:
    """vLLM with an event loop of its own, which outlives the loops of the tests."""

    def __init__(self, directory: Path) -> None:
        model().save_pretrained(directory)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm-loop", daemon=True).start()
        self.llm = start_vllm(
            directory,
            slots=64,
            tensor_parallel_size=1,
            engine_args={"block_size": BLOCK, "kv_cache_memory_bytes": 64 << 20},
            threads=1,
        )
        # The first request compiles what is compiled late, which can take longer than a test may.
        self.call(self.engine().engine.sample(request()))

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(120)

    async def awaited(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def engine(
        self, update_mode: UpdateMode = "keep", slots: int = 64, eos_token_ids: tuple[int, ...] = (EOS,)
    ) -> "OnLoop":
        """An engine at version 0 with the weights of `model()`, and nothing in its cache."""
        engine = VllmEngine(
            _Kept(self.llm),
            policy=policy_tensors(model()),
            vocabulary_size=VOCABULARY,
            context_length=CONTEXT,
            eos_token_ids=eos_token_ids,
            slots=slots,
            update_mode=update_mode,
        )
        self.call(engine.load(0, policy_tensors(model())))
        self.call(self.llm.reset_prefix_cache())
        return OnLoop(self, engine)

    def close(self) -> None:
        self.llm.shutdown()


class _Kept:
    """vLLM that a closed engine leaves running for the next test."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def shutdown(self) -> None:
        pass


class OnLoop:
    """The engine under test; its calls run in the loop that vLLM's connections belong to."""

    def __init__(self, shared: SharedVllm, engine: VllmEngine) -> None:
        self._shared = shared
        self.engine = engine

    @property
    def version(self) -> int:
        return self.engine.version

    @property
    def vocabulary_size(self) -> int:
        return self.engine.vocabulary_size

    @property
    def context_length(self) -> int:
        return self.engine.context_length

    async def sample(self, request: SampleRequest) -> list[Sample]:
        return await self._shared.awaited(self.engine.sample(request))

    @property
    def loads_changes(self) -> bool:
        return self.engine.loads_changes

    async def load(self, version: int, tensors: Mapping[str, Tensor], *, changed_only: bool = False) -> LoadReport:
        return await self._shared.awaited(self.engine.load(version, tensors, changed_only=changed_only))

    async def close(self) -> None:
        await self._shared.awaited(self.engine.close())
