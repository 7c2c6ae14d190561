"""Engine over a Hugging Face causal language model: a thread that decodes, and an asyncio side that awaits it."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from threading import Condition, Thread
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from actors.engines.decode import Decoder
from actors.engines.request_rules import check_request
from actors.engines.rows import Job
from distrl.errors import ConfigError, PolicyError, StageError
from distrl.sampling import LoadReport, Sample, SampleRequest, UpdateMode
from distrl.seeding import sampling_noise

T = TypeVar("T")


class _Reply(Generic[T]):
    """A future that another thread may settle; settling it twice, or after its loop has closed, does nothing."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self._loop.create_future()

    def resolve(self, value: T) -> None:
        self._settle(lambda: self.future.set_result(value))

    def fail(self, error: BaseException) -> None:
        self._settle(lambda: self.future.set_exception(error))

    def _settle(self, settle: Callable[[], None]) -> None:
        def unless_done() -> None:
            if not self.future.done():
                settle()

        # A closed loop has no task left that waits for the answer.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(unless_done)


class TransformersEngine:
    """Samples with its own decode loop in a thread of its own; the model belongs to the engine from here on.

    Requests, new weights and cancellations take effect between two decode steps. Cancelling a `sample` call frees its
    slots. If the thread meets an error, every call in flight and every later one raises StageError.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        slots: int,
        threads: int,
        version: int = 0,
        update_mode: UpdateMode = "keep",
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            model: on one device, with full or sliding-window attention in every layer.
            slots: responses that are sampled at the same time, >= 1; a multiple of 32 wastes none.
            threads: torch threads, >= 1, set for the whole process. Only with 1 is a request's result independent,
                to the last bit, of what runs beside it.
            version: policy version of the model's weights.
            update_mode: what becomes of the keys and values of sequences in flight when new weights are loaded.
            on_step: called in the decode thread after every step with the number of steps so far; new requests and
                weights take effect when it returns. For tests that place an event between two steps.
        Raises:
            ConfigError: the model cannot run here, or a number is out of range.
        """
        whole_config: Any = model.config
        config = whole_config.get_text_config()
        _check_model(config)
        for name, number in (("slots", slots), ("threads", threads)):
            if number < 1:
                raise ConfigError(f"engine {name} must be >= 1, got {number}; use 1 for the smallest engine")
        self._vocabulary_size: int = config.vocab_size
        self._context_length: int = config.max_position_embeddings
        for name, token in (("pad_token_id", pad_token_id), *(("eos_token_ids", t) for t in eos_token_ids)):
            if not 0 <= token < self._vocabulary_size:
                raise ConfigError(
                    f"engine {name} must be in 0..{self._vocabulary_size - 1}, got {token}; "
                    "use the tokenizer that belongs to the model"
                )
        eos_V = torch.zeros(self._vocabulary_size, dtype=torch.bool)
        eos_V[list(eos_token_ids)] = True
        self._decoder = Decoder(
            model,
            context_length=self._context_length,
            eos_V=eos_V.to(next(model.parameters()).device),
            pad_token_id=pad_token_id,
            slots=slots,
            version=version,
            update_mode=update_mode,
        )
        self._on_step = on_step
        self._threads = threads
        self._steps = 0
        # Guards what follows it; held for moments only, never during a step.
        self._wake = Condition()
        self._commands: list[Callable[[], None]] = []
        self._open: set[_Reply[Any]] = set()
        self._samples: dict[Job, _Reply[list[Sample]]] = {}
        self._failure: Callable[[], StageError] | None = None
        """Builds the error of every call, once the thread has stopped or is about to; a new one for each caller."""
        self._thread = Thread(target=self._run, name="distrl-decode", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int:
        return self._decoder.version

    @property
    def vocabulary_size(self) -> int:
        return self._vocabulary_size

    @property
    def context_length(self) -> int:
        return self._context_length

    async def sample(self, request: SampleRequest) -> list[Sample]:
        """The request's responses, in order of their index; more responses than slots are sampled in parts.

        Raises:
            StageError: the request breaks a rule, or the engine has stopped.
        """
        check_request(request, vocabulary_size=self._vocabulary_size, context_length=self._context_length)
        noise = sampling_noise(request.stream, request.responses, request.params.max_new_tokens)
        job = Job(request, noise)
        reply: _Reply[list[Sample]] = _Reply()

        def submit() -> None:
            self._samples[job] = reply
            self._decoder.submit(job)

        def cancel() -> None:
            self._samples.pop(job, None)
            self._decoder.cancel(job)

        self._ask(reply, submit)
        try:
            return await reply.future
        except asyncio.CancelledError:
            # Nobody waits for the cancellation; a stopped engine has nothing to cancel.
            with contextlib.suppress(StageError):
                self._ask(None, cancel)
            raise

    @property
    def loads_changes(self) -> bool:
        return True

    async def load(self, version: int, tensors: Mapping[str, Tensor], *, changed_only: bool = False) -> LoadReport:
        """Replace weights between two decode steps; `tensors` must not change until this returns.

        Args:
            changed_only: what `tensors` lacks stays as it is.
        Raises:
            PolicyError: a tensor is missing, unknown or misshapen, or the version is older than the loaded one; the old
                weights stay.
            StageError: the engine has stopped.
        """
        # Here rather than in the thread, which goes on sampling meanwhile.
        self._decoder.check(version, tensors, changed_only=changed_only)
        reply: _Reply[LoadReport] = _Reply()

        def load() -> None:
            try:
                reply.resolve(self._decoder.load(version, tensors))
            except PolicyError as error:
                reply.fail(error)

        self._ask(reply, load)
        return await reply.future

    async def close(self) -> None:
        """Stop the thread after its present step; calls in flight raise StageError. May be called again."""
        self._stop(lambda: StageError("generation engine: closed; start another one"))
        await asyncio.to_thread(self._thread.join)

    def _ask(self, reply: _Reply[Any] | None, command: Callable[[], None]) -> None:
        """Have the thread run `command` before its next step; should it stop instead, `reply` fails."""
        with self._wake:
            if self._failure is not None:
                raise self._failure()
            if reply is not None:
                self._open.add(reply)
                reply.future.add_done_callback(lambda _: self._open.discard(reply))
            self._commands.append(command)
            self._wake.notify()

    def _stop(self, failure: Callable[[], StageError]) -> None:
        with self._wake:
            if self._failure is None:
                self._failure = failure
            for reply in list(self._open):
                reply.fail(self._failure())
            self._wake.notify()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                while self._take_commands():
                    for job in self._decoder.step():
                        self._samples.pop(job).resolve([job.samples[g] for g in range(job.request.responses)])
                    self._steps += 1
                    if self._on_step is not None:
                        self._on_step(self._steps)
        except BaseException as error:  # noqa: BLE001  (whatever it is, the callers would wait forever)
            cause = error

            def failure() -> StageError:
                stopped = StageError(
                    f"generation engine: stopped by {type(cause).__name__}: {cause}; start another one"
                )
                stopped.__cause__ = cause
                return stopped

            self._stop(failure)

    def _take_commands(self) -> bool:
        """Run what was asked for since the last step; waits while there is nothing to sample. False: stop."""
        while True:
            with self._wake:
                while not (self._commands or self._failure or self._decoder.busy):
                    self._wake.wait()
                if self._failure is not None:
                    return False
                commands, self._commands = self._commands, []
            for command in commands:
                command()
            if self._decoder.busy:
                return True


def _check_model(config: Any) -> None:
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not layer_types <= {"full_attention", "sliding_attention"}:
        raise ConfigError(
            "transformers engine: every layer of the model must have full or sliding-window attention, "
            f"got {', '.join(sorted(layer_types))}; use the vLLM engine for this model"
        )
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ConfigError(
            "transformers engine: the model's attention implementation must be sdpa or eager (they take a mask), "
            f'got {attention}; load the model with attn_implementation="sdpa"'
        )
