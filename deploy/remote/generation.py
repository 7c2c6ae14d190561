"""The generation actor."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import ray

from actors.calls import RayCaller, WorkerLostError, unwrap
from actors.engines.build import build_adapters, build_engine
from actors.episodes import EpisodeLimits, Episodes
from actors.generation import Generation
from actors.transfer.transport import Transport
from deploy.remote.located import Located, whereabouts
from distrl.config import Config
from distrl.config_sections import LoraConfig
from distrl.errors import DeadlineError, LostWeightsError
from distrl.messages import Chunk, Content, Delivery, Layout, Manifest
from distrl.models import load_tokenizer
from distrl.prompts import PromptEncoder
from distrl.tasks.problem import Message
from distrl.tickets import POLICY_WEIGHTS


class GenerationActor(Generation, Located):
    """`Generation` with the engine that the config names, once for each of the weights that it samples from."""

    def __init__(
        self,
        config: Config,
        name: str,
        store: Any,
        weights: Sequence[str] = (POLICY_WEIGHTS,),
        environments: Sequence[Any] = (),
    ) -> None:
        import torch  # not at the top: holders of a handle import this module

        torch.set_num_threads(config.run.threads_per_process)
        tokenizer = load_tokenizer(config.model.path)
        configs = {one: engine_config(config, one) for one in weights}
        shares = reference_shares(config)
        engines = {one: build_engine(configs[one], tokenizer, shares.get(one, 0.0)) for one in weights}
        built = {one: build_adapters(configs[one], engine) for one, engine in engines.items()}
        adapters = {one: adapters for one, adapters in built.items() if adapters is not None}
        text = ModelText(tokenizer, config.environment.role)
        callers = [RayCaller(f"environment-{i}", handle) for i, handle in enumerate(environments)]
        episodes = Episodes(callers, text, episode_limits(config)) if callers else None
        source = StoreSource(name, store, config.limits.sync_timeout_s)
        transport = transport_of(config, source)
        super().__init__(
            *(name, engines, text, config.sampling, source.fetch),
            episodes=episodes,
            adapters=adapters,
            transport=transport,
        )


def episode_limits(config: Config) -> EpisodeLimits:
    """When an episode ends, from the config."""
    e = config.environment
    return EpisodeLimits(e.max_turns, e.max_turn_tokens, e.timeout_s)


def engine_config(config: Config, weights: str) -> Config:
    """The config for the engine of these weights: the directory that it starts from, and its part of the device."""
    changes: dict[str, Any] = {}
    if weights == "reference":
        changes["lora"] = LoraConfig()  # it is never trained
        if config.reference.path is not None:
            changes["model"] = config.model.model_copy(update={"path": config.reference.path})
    if config.generation.engine == "vllm" and config.placement.mode in ("shared", "turns"):
        memory: dict[str, Any] = {"gpu_memory_utilization": config.placement.generation_share}
        if config.placement.mode == "turns":
            memory["enable_sleep_mode"] = True
        arguments = {**config.generation.engine_args, **memory}
        changes["generation"] = config.generation.model_copy(update={"engine_args": arguments})
    return config.model_copy(update=changes)


def reference_shares(config: Config) -> dict[str, float]:
    """By the name of weights that are mixed with the reference while they sample, its share."""
    # Imported here: whoever holds a handle imports this module, and needs no torch.
    from distrl.objectives import build
    from distrl.objectives.upkeep import Mixture

    upkeep = build(config.objective.recipe, **config.objective.options).upkeep
    return {name: kept.share for name, kept in upkeep.items() if isinstance(kept, Mixture)}


def transport_of(config: Config, source: "StoreSource") -> Transport | None:
    """The way of `generation.transport`, for an actor that else takes weights from this source."""
    if config.generation.transport == "store":
        return None
    from actors.transfer.planes import known_plane
    from actors.transfer.receiver import Receiver

    timeout_s = config.limits.transport_timeout_s
    receiver = Receiver(known_plane(config.generation.transport), timeout_s)
    return Transport(source.ask, source.chunks, receiver, whereabouts().node, timeout_s)


class StoreSource:
    """How the generation actor `name` gets weights from the policy store's actor, in at most `timeout_s` seconds."""

    def __init__(self, name: str, store: Any, timeout_s: float) -> None:
        self._name = name
        self._caller = RayCaller("policy-store", store)
        self._timeout_s = timeout_s

    async def fetch(
        self, weights: str, version: int, have: Mapping[str, Content]
    ) -> tuple[Manifest, Layout, list[Chunk]]:
        """See `actors.generation.Fetch`."""
        async with self._bounded(weights, version):
            delivery = await self._deliver(version, have, weights)
            return delivery.manifest, delivery.layout, await self._resolve(delivery)

    async def ask(self, version: int, have: Mapping[str, Content], weights: str, from_store: bool) -> Delivery:
        """See `actors.transfer.transport.Ask`."""
        async with self._bounded(weights, version):
            return await self._deliver(version, have, weights, from_store)

    async def chunks(self, delivery: Delivery) -> list[Chunk]:
        """The bytes that a delivery refers to."""
        async with self._bounded(delivery.manifest.weights, delivery.manifest.version):
            return await self._resolve(delivery)

    async def _deliver(
        self, version: int, have: Mapping[str, Content], weights: str, from_store: bool = False
    ) -> Delivery:
        arguments = (version, have, weights, *([True] if from_store else []))
        delivery: Delivery = await self._caller.ask("fetch", *arguments, timeout_s=self._timeout_s)
        return delivery

    async def _resolve(self, delivery: Delivery) -> list[Chunk]:
        references: Any = delivery.chunks
        # One after the other: what is verified next is what came first, and the network is shared anyway.
        return [await reference for reference in references]

    @asynccontextmanager
    async def _bounded(self, weights: str, version: int) -> AsyncIterator[None]:
        what = f"{self._name} fetching {weights} version {version}"
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except (TimeoutError, ray.exceptions.GetTimeoutError):
            raise DeadlineError(
                f"{what} from policy-store must end within limits.sync_timeout_s = {self._timeout_s:g} s, it did not"
            ) from None
        except ray.exceptions.RayTaskError as error:
            raise unwrap(error, what) from error
        except (ray.exceptions.RayError, WorkerLostError) as error:
            # The store's process is gone, and with it the chunks that it owned.
            raise LostWeightsError(
                f"{what}: the policy store must have its chunks, it has lost them ({type(error).__name__}); "
                "the learner has to publish it again"
            ) from error


class ModelText:
    """Prompts to tokens and tokens to text with a Hugging Face tokenizer; special tokens are not text.

    The chat template is applied here: coordinator and graders have no tokenizer, and the conversation that they have
    is what a grader wants to see.
    """

    def __init__(self, tokenizer: Any, role: str = "user") -> None:
        """
        Args:
            role: who speaks for an environment in a conversation.
        """
        self._tokenizer = tokenizer
        self._prompts = PromptEncoder(tokenizer)
        self._role = role

    def encode(self, prompt: str, messages: Sequence[Message] = ()) -> tuple[int, ...]:
        return self._prompts.encode(prompt, messages)

    def observe(self, observation: str, chat: bool) -> tuple[int, ...]:
        return self._prompts.observation(observation, self._role, chat=chat)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
