"""The generation actor."""

from collections.abc import Sequence
from typing import Any

import ray
import torch

from actors.calls import RayCaller, unwrap
from actors.engines.build import build_engine
from actors.generation import Generation
from deploy.remote.located import Located
from distrl.config import Config
from distrl.messages import Chunk, Manifest
from distrl.models import load_tokenizer
from distrl.prompts import PromptEncoder
from distrl.tasks.problem import Message


class GenerationActor(Generation, Located):
    """`Generation` with the engine that the config names."""

    def __init__(self, config: Config, name: str, store: Any) -> None:
        caller = RayCaller("policy-store", store)

        async def fetch(version: int) -> tuple[Manifest, list[Chunk]]:
            timeout_s = config.limits.sync_timeout_s
            manifest, refs = await caller.ask("fetch", version, timeout_s=timeout_s)
            try:
                return manifest, [await ref for ref in refs]
            except ray.exceptions.RayTaskError as error:
                raise unwrap(error, f"{name} fetching policy version {version}") from error

        torch.set_num_threads(config.run.threads_per_process)
        tokenizer = load_tokenizer(config.model.path)
        engine = build_engine(config, tokenizer)
        super().__init__(name, engine, ModelText(tokenizer), config.sampling, fetch)


class ModelText:
    """Prompts to tokens and tokens to text with a Hugging Face tokenizer; special tokens are not text.

    The chat template is applied here: coordinator and graders have no tokenizer, and the conversation that they have
    is what a grader wants to see.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._prompts = PromptEncoder(tokenizer)

    def encode(self, prompt: str, messages: Sequence[Message] = ()) -> tuple[int, ...]:
        return self._prompts.encode(prompt, messages)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
