"""Engine over vLLM: its asynchronous engine samples in processes of its own, and takes new weights in place.

vLLM batches the responses of all requests in flight; each is a request of vLLM's with a seed of its own. What vLLM
records is what is passed on: log-probabilities of the distribution after temperature, top-k and top-p, and the weight
version of every token. docs/vllm.md has what an update does to the cache.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams as VllmParams
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from actors.engines.request_rules import check_request
from actors.engines.shared_weights import Placed, shared_weights
from distrl.errors import PolicyError, StageError
from distrl.sampling import FinishReason, LoadReport, Sample, SampleRequest, SamplingParams, UpdateMode
from distrl.seeding import response_seeds
from distrl.weights import check_newer, check_policy

if TYPE_CHECKING:
    from torch import Tensor

LOWEST_TEMPERATURE = 0.01
"""vLLM samples with this where it is asked for less."""

_CLOSED = "closed"
_FIRST_LABEL = "default"
"""What vLLM calls the weights that it started with."""
_REASONS: Mapping[str | None, FinishReason] = {"stop": "stop", "length": "length"}


class VllmEngine:
    """Samples with vLLM; `llm` belongs to the engine from here on.

    Cancelling a `sample` call takes its responses out of vLLM. If vLLM dies, every call in flight and every later one
    raises StageError.
    """

    def __init__(
        self,
        llm: Any,
        *,
        policy: "Mapping[str, Tensor]",
        vocabulary_size: int,
        context_length: int,
        eos_token_ids: tuple[int, ...],
        slots: int,
        update_mode: UpdateMode,
        version: int = 0,
    ) -> None:
        """
        Args:
            llm: vLLM's `AsyncLLM`, as `actors.engines.vllm_start.start_vllm` makes it.
            policy: the model's tensors by the names they are published under. Only names and shapes are read: they may
                be on the meta device.
            slots: responses that are in vLLM at the same time, >= 1.
            version: policy version of the weights that vLLM has.
        """
        self._llm = llm
        self._policy = policy
        self._vocabulary_size = vocabulary_size
        self._context_length = context_length
        self._eos_token_ids = list(eos_token_ids)
        self._slots = asyncio.Semaphore(slots)
        self._update_mode = update_mode
        self._version = version
        self._versions = {_FIRST_LABEL: version}
        self._numbers = itertools.count()
        self._submission = asyncio.Lock()
        """Held while one response is handed to vLLM, and by an update: none is handed over during one."""
        self._loading = asyncio.Lock()
        self._connected = False
        self._in_vllm: dict[str, Any] = {}
        """Responses that vLLM has, by vLLM's name for them: what their output comes through."""
        self._withdrawn: set[str] = set()
        self._tasks: set[asyncio.Task[Sample]] = set()
        self._failure: str | None = None

    @property
    def version(self) -> int:
        return self._version

    @property
    def vocabulary_size(self) -> int:
        return self._vocabulary_size

    @property
    def context_length(self) -> int:
        return self._context_length

    async def sample(self, request: SampleRequest) -> list[Sample]:
        """
        Raises:
            StageError: the request breaks a rule, or the engine is closed or has stopped (also meanwhile).
        """
        check_request(request, vocabulary_size=self._vocabulary_size, context_length=self._context_length)
        if request.params.temperature < LOWEST_TEMPERATURE:
            raise StageError(
                f"generation request {request.request_id!r}: temperature must be >= {LOWEST_TEMPERATURE} for vLLM, "
                f"got {request.params.temperature}; raise it or use generation.engine=transformers"
            )
        self._refuse_if_stopped()
        seeds = response_seeds(request.stream, request.responses)
        tasks = [asyncio.create_task(self._respond(request, seed)) for seed in seeds]
        self._tasks.update(tasks)
        try:
            return list(await asyncio.gather(*tasks))
        except (EngineDeadError, EngineGenerateError) as error:
            self._stop(f"stopped by {type(error).__name__}: {error}")
            raise self._stopped() from error
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if self._failure is not None and this is not None and not this.cancelling():
                raise self._stopped() from None  # not the caller was canceled, but the responses
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tasks.difference_update(tasks)

    async def _respond(self, request: SampleRequest, seed: int) -> Sample:
        params = self._params(request.params, seed)
        async with self._slots:
            while True:
                async with self._submission:
                    collector = await self._submit(request, params)
                name = collector.request_id
                try:
                    final = await collector.get()
                except asyncio.CancelledError:
                    await self._llm.abort(name, internal=True)
                    raise
                finally:
                    collector.close()
                    self._in_vllm.pop(name, None)
                if name not in self._withdrawn:
                    return self._read(request, final.outputs[0])
                self._withdrawn.discard(name)

    async def _submit(self, request: SampleRequest, params: VllmParams) -> Any:
        prompt = {
            "type": "token",
            "prompt_token_ids": list(request.prompt_token_ids),
            # What the cache keeps of a prompt is found again only under the version that computed it.
            "cache_salt": str(self._version),
        }
        name = f"{request.request_id}-{next(self._numbers)}"
        try:
            collector = await self._llm.add_request(name, prompt, params)
        except asyncio.CancelledError:
            await self._llm.abort(name)
            raise
        self._in_vllm[collector.request_id] = collector
        return collector

    def _params(self, params: SamplingParams, seed: int) -> VllmParams:
        return VllmParams(
            max_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=seed,
            logprobs=0,  # that of the sampled token, and no other
            stop_token_ids=self._eos_token_ids,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _read(self, request: SampleRequest, output: Any) -> Sample:
        tokens = [int(token) for token in output.token_ids]
        reason = _REASONS.get(output.finish_reason)
        spans = output.weight_versions
        if reason is None or not tokens or spans is None or output.logprobs is None:
            raise StageError(
                f"generation request {request.request_id!r}: vLLM must finish a response by stop or length, with "
                f"log-probabilities and versions, got finish reason {output.finish_reason!r} after {len(tokens)} "
                "tokens; look at vLLM's log"
            )
        logps = [
            # The logarithm of a sum may be rounded to just below that of its largest term.
            min(0.0, float(position[token].logprob))
            for token, position in zip(tokens, output.logprobs, strict=True)
        ]
        versions = [self._versions[span.version] for span in spans for _ in range(span.start, span.end)]
        return Sample(tokens, logps, versions, reason)

    @property
    def loads_changes(self) -> bool:
        return False  # vLLM computes with matrices that are made of several tensors, and takes those together

    async def load(self, version: int, tensors: "Mapping[str, Tensor]", *, changed_only: bool = False) -> LoadReport:
        """Replace all weights between two decode steps; `tensors` must not change until this returns.

        Args:
            changed_only: makes no difference: all tensors must be given.
        Raises:
            PolicyError: a tensor is missing, unknown or misshapen, the version is older than the loaded one, or vLLM
                refused the weights; the old weights stay.
            StageError: the engine is closed or has stopped, or the weights were lost half-way, which stops it.
        """
        check_policy(version, self._policy, tensors)
        self._refuse_if_stopped()
        async with self._loading, contextlib.AsyncExitStack() as stack:
            check_newer(version, self._version)
            # Written and checked while sampling goes on.
            shared = contextlib.ExitStack()
            stack.callback(shared.close)
            path, placed = await asyncio.to_thread(shared.enter_context, shared_weights(version, tensors))
            async with self._submission:
                self._refuse_if_stopped()
                try:
                    return await self._update(version, path, placed)
                except EngineDeadError as error:
                    self._stop(f"stopped by {type(error).__name__}: {error}")
                    raise self._stopped() from error

    async def _update(self, version: int, path: Path, placed: list[Placed]) -> LoadReport:
        if not self._connected:
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest())
            self._connected = True
        began = perf_counter()
        recompute = self._update_mode == "recompute"
        # With clear_cache vLLM computes prompts and responses in flight again, under the new weights.
        await self._llm.pause_generation(mode="keep", clear_cache=recompute)
        try:
            in_flight = self._begun()
            if not recompute:
                await self._withdraw(set(self._in_vllm) - in_flight)
            await self._replace(version, path, placed)
        finally:
            await self._llm.resume_generation()
        return LoadReport(version, perf_counter() - began, len(in_flight))

    async def _replace(self, version: int, path: Path, placed: list[Placed]) -> None:
        await self._llm.start_weight_update()
        update = {"path": str(path), "placed": [asdict(entry) for entry in placed]}
        try:
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update))
        except EngineDeadError:
            raise
        except Exception as error:
            raise PolicyError(
                f"policy version {version}: vLLM must be able to take the weights, got {error}; version "
                f"{self._version} stays"
            ) from error
        self._versions[str(version)] = version
        try:
            await self._llm.finish_weight_update(str(version))
        except BaseException as error:
            self._stop(f"stopped by {type(error).__name__} while the weights were replaced: {error}")
            raise self._stopped() from error
        self._version = version

    def _begun(self) -> set[str]:
        """Responses in vLLM that have a token; vLLM's output processor is the only one who knows."""
        states = self._llm.output_processor.request_states
        return {name for name in self._in_vllm if name in states and states[name].detokenizer.num_output_tokens()}

    async def _withdraw(self, names: set[str]) -> None:
        """Take responses without a token out of vLLM; they are handed to it again after the update.

        Otherwise they might find their prompt in the cache as the old weights computed it, while all their tokens
        name the new version.
        """
        states = self._llm.output_processor.request_states
        unfinished = names & set(states)
        self._withdrawn |= unfinished
        await self._llm.abort(unfinished, internal=True)

    async def sleep(self) -> None:
        """Give back the device's memory: the weights go to the host's, the cache is dropped. Needs a GPU and vLLM's
        `enable_sleep_mode`.

        Raises:
            StageError: responses are in flight.
        """
        if self._in_vllm:
            raise StageError(
                f"generation engine: must have no response in flight to sleep, has {len(self._in_vllm)}; wait for them"
            )
        await self._llm.sleep(level=1)

    async def wake(self) -> None:
        """Take the memory again, with the weights from before the sleep."""
        await self._llm.wake_up()

    async def close(self) -> None:
        """End vLLM's processes; calls in flight raise StageError. May be called again."""
        if self._failure != _CLOSED:
            self._stop(_CLOSED)
            await asyncio.to_thread(self._llm.shutdown)

    def _stop(self, failure: str) -> None:
        if self._failure is None:
            self._failure = failure
        for task in self._tasks:
            task.cancel()

    def _stopped(self) -> StageError:
        return StageError(f"generation engine: {self._failure}; start another one")

    def _refuse_if_stopped(self) -> None:
        if self._failure is not None:
            raise self._stopped()
