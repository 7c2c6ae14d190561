"""Engine without a model: instant, and every token a function of its request, its place and the policy version."""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from actors.engines.request_rules import check_request
from distrl.errors import StageError
from distrl.sampling import FinishReason, LoadReport, Sample, SampleRequest
from distrl.weights import check_newer, check_policy

if TYPE_CHECKING:
    from torch import Tensor

Gate = Callable[[SampleRequest], Awaitable[None]]


class FakeEngine:
    """Answers at once, or when its gate opens; keeps what it was asked for tests to read.

    Every response's first token is sampled before the gate and the others after it, so weights that are loaded
    meanwhile give responses that span versions.

    Args:
        gate: awaited by every request; an `asyncio.Event` in it lets a test fix what happens in which order.
        fail: the error a request shall meet after the gate, or None.
        policy: tensors that `load` shall accept by name and shape; None accepts any.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int = 32,
        context_length: int = 256,
        eos_token_id: int = 0,
        version: int = 0,
        gate: Gate | None = None,
        fail: Callable[[SampleRequest], BaseException | None] | None = None,
        policy: "Mapping[str, Tensor] | None" = None,
    ) -> None:
        self._vocabulary_size = vocabulary_size
        self._context_length = context_length
        self._eos_token_id = eos_token_id
        self._version = version
        self._gate = gate
        self._fail = fail
        self._policy = policy
        self._in_flight = 0
        self._closed = False
        self.asleep = False
        self.requests: list[SampleRequest] = []
        """Every request that was let in, in order."""
        self.loads: list[int] = []
        """Every version that was loaded, in order."""

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
            StageError: the request breaks a rule, or the engine is closed (also when it closes meanwhile).
        """
        check_request(request, vocabulary_size=self._vocabulary_size, context_length=self._context_length)
        self._refuse_if_closed_or_asleep()
        self.requests.append(request)
        first_version = self._version
        self._in_flight += request.responses
        try:
            if self._gate is not None:
                await self._gate(request)
        finally:
            self._in_flight -= request.responses
        self._refuse_if_closed_or_asleep()
        error = self._fail(request) if self._fail is not None else None
        if error is not None:
            raise error
        return [self._response(request, g, first_version) for g in range(request.responses)]

    def _response(self, request: SampleRequest, g: int, first_version: int) -> Sample:
        tokens, logps, versions = list[int](), list[float](), list[int]()
        reason: FinishReason = "length"
        for t in range(request.params.max_new_tokens):
            version = self._version if t else first_version
            token, logp = self._draw(request, g, t, version)
            tokens.append(token)
            logps.append(logp)
            versions.append(version)
            if token == self._eos_token_id:
                reason = "stop"
                break
        return Sample(tokens, logps, versions, reason)

    def _draw(self, request: SampleRequest, g: int, t: int, version: int) -> tuple[int, float]:
        key = repr((request.stream, request.prompt_token_ids, request.params, g, t, version))
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        # In [-4, 0), where log-probabilities of a trained policy mostly are.
        return int.from_bytes(digest[:4]) % self._vocabulary_size, -int.from_bytes(digest[4:]) / 2**30 - 2**-33

    @property
    def loads_changes(self) -> bool:
        return True

    async def load(self, version: int, tensors: "Mapping[str, Tensor]", *, changed_only: bool = False) -> LoadReport:
        """
        Raises:
            PolicyError: a tensor does not fit `policy`, or the version is older than the loaded one.
            StageError: the engine is closed.
        """
        if self._policy is not None:
            check_policy(version, self._policy, tensors, changed_only=changed_only)
        self._refuse_if_closed_or_asleep()
        check_newer(version, self._version)
        self._version = version
        self.loads.append(version)
        return LoadReport(version, 0.0, self._in_flight)

    async def sleep(self) -> None:
        """
        Raises:
            StageError: requests are in flight.
        """
        if self._in_flight:
            raise StageError(
                f"generation engine: must have no response in flight to sleep, has {self._in_flight}; wait for them"
            )
        self.asleep = True

    async def wake(self) -> None:
        self.asleep = False

    async def close(self) -> None:
        self._closed = True

    def _refuse_if_closed_or_asleep(self) -> None:
        if self._closed:
            raise StageError("generation engine: closed; start another one")
        if self.asleep:
            raise StageError("generation engine: asleep; wake it first")
