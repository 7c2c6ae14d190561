"""Generation: samples the responses of a ticket and returns them as a record batch."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import ray

from actors.episodes import Episodes, Trajectory, single_turn
from actors.transfer.transport import Transport
from distrl.errors import PolicyError, StageError
from distrl.manifest import unpack
from distrl.messages import Chunk, Content, GenerationReceipt, Layout, LoadReceipt, Manifest
from distrl.sampling import Engine, LoadReport, SampleRequest, SamplingParams, Sleeper
from distrl.schema import Stage, record_batch
from distrl.tasks.problem import Message, Problem
from distrl.tickets import POLICY_WEIGHTS, Ticket, weights_of

if TYPE_CHECKING:
    from torch import Tensor

    from actors.adapters import Adapters

Fetch = Callable[[str, int, Mapping[str, Content]], Awaitable[tuple[Manifest, Layout, Sequence[Chunk]]]]
"""Gets a published version of some weights from the policy store, without the tensors that are here already (by name):
its manifest and the bytes. Has a deadline of its own."""


class Text(Protocol):
    """The part of a tokenizer that generation needs."""

    def encode(self, prompt: str, messages: Sequence[Message], /) -> tuple[int, ...]:
        """Tokens of a prompt, or of its conversation where `messages` has one."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class Generation:
    """Samples tickets with an engine; many calls run at the same time and share the engine's batches.

    Args:
        name: of this worker, for messages and the `engine` column.
        engines: by the name of the weights that they hold, see `distrl.tickets.weights_of`.
        fetch: how to get a published version; called while sampling goes on.
        clock: seconds since the epoch.
        episodes: how to play them, where a rollout is one; else it is one response.
        adapters: of the engines whose weights are published as adapters alone, by the name of the weights.
        transport: takes the place of `fetch`, where weights may come another way than from the store.
    """

    def __init__(
        self,
        name: str,
        engines: Mapping[str, Engine],
        text: Text,
        params: SamplingParams,
        fetch: Fetch,
        clock: Callable[[], float] = time.time,
        episodes: Episodes | None = None,
        adapters: "Mapping[str, Adapters] | None" = None,
        transport: Transport | None = None,
    ) -> None:
        self._name = name
        self._adapters = adapters or {}
        self._episodes = episodes
        self._engines = engines
        self._text = text
        self._params = params
        self._transport = transport
        self._fetch = fetch if transport is None else transport
        self._clock = clock
        self._loading = asyncio.Lock()
        # What each engine holds, as far as it came from the store.
        self._have: dict[str, Mapping[str, Content]] = {name: {} for name in engines}

    @ray.method(num_returns=2)
    async def generate(
        self, ticket: Ticket, problem: Problem | None = None
    ) -> tuple[GenerationReceipt, pa.RecordBatch]:
        """Samples `ticket.group_size` responses or episodes.

        Args:
            problem: of the ticket; episodes need it.

        Raises:
            StageError: the engine cannot sample the prompt, or no engine here has the weights of the ticket's role.
            SchemaError: the engine answered something impossible.
        """
        started_s = self._clock()
        prompt = self._text.encode(ticket.prompt, ticket.messages)
        name = f"{ticket.role[0]}{ticket.ticket_id}.{ticket.redraw}"
        request = SampleRequest(name, prompt, ticket.group_size, self._params, ticket.stream)
        samples = await self._rollouts(self._engine(weights_of(ticket.role)), request, problem)
        batch = self._batch(ticket, prompt, samples, started_s)
        receipt = GenerationReceipt(
            ticket_id=ticket.ticket_id,
            rollouts=len(samples),
            response_tokens=sum(len(s.token_ids) for s in samples),
            truncated=sum(s.finish_reason == "length" for s in samples),
            versions=tuple(sorted({v for s in samples for v in s.versions})),
            bytes=batch.nbytes,
            started_s=started_s,
            finished_s=self._clock(),
        )
        return receipt, batch

    async def _rollouts(self, engine: Engine, request: SampleRequest, problem: Problem | None) -> list[Trajectory]:
        if self._episodes is None:
            return [single_turn(sample) for sample in await engine.sample(request)]
        if problem is None:
            raise StageError(f"{self._name} must be given the problem of {request.request_id} to play its episodes")
        return await self._episodes.play_group(engine, request, problem)

    def _batch(
        self, ticket: Ticket, prompt: tuple[int, ...], samples: list[Trajectory], started_s: float
    ) -> pa.RecordBatch:
        rows = len(samples)
        columns: dict[str, Any] = {
            "rollout_id": [ticket.rollout_id(g) for g in range(rows)],
            "ticket_id": [ticket.ticket_id] * rows,
            "redraw": [ticket.redraw] * rows,
            "prompt_id": [ticket.prompt_id] * rows,
            "role": [ticket.role] * rows,
            "group_index": list(range(rows)),
            "prompt_token_ids": [(*prompt, *s.first_observation) for s in samples],
            "response_token_ids": [s.token_ids for s in samples],
            "behavior_logps": [s.logps for s in samples],
            "policy_versions": [s.versions for s in samples],
            "loss_mask": [s.mask for s in samples],
            "turn_rewards": [s.turn_rewards for s in samples],
            "turn_ends": [s.turn_ends for s in samples],
            "finish_reason": [s.finish_reason for s in samples],
            "text": [self._text.decode(s.token_ids) for s in samples],
            "temperature": [self._params.temperature] * rows,
            "top_p": [self._params.top_p] * rows,
            "top_k": [self._params.top_k] * rows,
            "max_new_tokens": [self._params.max_new_tokens] * rows,
            "engine": [self._name] * rows,
            "v_star": [ticket.v_star] * rows,
            "generation_started_s": [started_s] * rows,
            "generation_finished_s": [self._clock()] * rows,
        }
        return record_batch(Stage.GENERATION, columns)

    def _engine(self, weights: str) -> Engine:
        if weights not in self._engines:
            raise StageError(
                f"{self._name} must hold the weights {weights!r} to sample from them, it has "
                f"{', '.join(self._engines)}; start it with those weights"
            )
        return self._engines[weights]

    @ray.method
    async def pull(self, version: int, weights: str = POLICY_WEIGHTS) -> LoadReceipt:
        """Fetches and verifies a published version while sampling goes on, then loads it between two decode steps.

        Only tensors that differ from those of the last pull are fetched, where the engine can load some alone or
        adapters are published.

        Raises:
            PolicyError: the store does not have it, its bytes are damaged, or a tensor does not fit; the old
                weights stay, and the message says which. DeadlineError: the store was not quick enough.
        """
        engine = self._engine(weights)
        async with self._loading:
            began = self._clock()
            try:
                manifest, tensors = await self._verified(weights, version)
                fetched = self._clock()
                report = await self._load(weights, version, tensors)
            except PolicyError as error:
                raise type(error)(f"{self._name} keeps {weights} version {engine.version}: {error}") from error
            if engine.loads_changes or weights in self._adapters:
                self._have[weights] = {entry.name: entry.content for entry in manifest.tensors}
            moved = sum(tensor.nbytes for tensor in tensors.values())
            way, fallback = ("store", None) if self._transport is None else self._transport.last
            return LoadReceipt(
                version,
                fetched - began,
                report.pause_s,
                report.sequences_in_flight,
                moved,
                len(tensors),
                way,
                fallback,
            )

    async def _verified(self, weights: str, version: int) -> tuple[Manifest, "dict[str, Tensor]"]:
        manifest, layout, chunks = await self._fetch(weights, version, self._have[weights])
        if (manifest.weights, manifest.version) != (weights, version):
            raise PolicyError(
                f"{weights} version {version} was asked for, got {manifest.weights} version {manifest.version}"
            )
        # A name that is no longer published would stay as it is in the engine; a whole load refuses it by name.
        if not self._have[weights].keys() <= {entry.name for entry in manifest.tensors}:
            self._have[weights] = {}
            manifest, layout, chunks = await self._fetch(weights, version, {})
        return manifest, await asyncio.to_thread(unpack, manifest, layout, chunks)

    async def _load(self, weights: str, version: int, tensors: "dict[str, Tensor]") -> LoadReport:
        changed_only = bool(self._have[weights])
        engine, adapters = self._engines[weights], self._adapters.get(weights)
        try:
            if adapters is None:
                return await engine.load(version, tensors, changed_only=changed_only)
            merged = await asyncio.to_thread(adapters.merged, version, tensors, changed_only=changed_only)
            report = await engine.load(version, merged, changed_only=engine.loads_changes)
            adapters.loaded(tensors)
            return report
        except PolicyError:
            raise  # refused as a whole
        except BaseException:
            self._have[weights] = {}  # how far the engine got is not known: the next pull is of everything
            raise

    @ray.method
    async def policy_version(self, weights: str = POLICY_WEIGHTS) -> int:
        """The version of some weights that it samples from now."""
        return self._engine(weights).version

    @ray.method
    async def sleep(self) -> None:
        """Gives the device's memory back, once a pull under way has ended.

        Raises:
            StageError: an engine cannot, or has requests in flight.
        """
        async with self._loading:
            for weights, engine in self._engines.items():
                if not isinstance(engine, Sleeper):
                    raise StageError(
                        f"{self._name} must have engines that can sleep, {type(engine).__name__} cannot; "
                        "set placement.mode to another one than turns"
                    )
                await engine.sleep()
                self._have[weights] = {}  # weights may not outlive the sleep

    @ray.method
    async def wake(self) -> None:
        """Takes the memory again; the next pull is of everything."""
        for engine in self._engines.values():
            if isinstance(engine, Sleeper):
                await engine.wake()

    @ray.method
    async def close(self) -> None:
        for engine in self._engines.values():
            await engine.close()
        if self._transport is not None:
            self._transport.close()
