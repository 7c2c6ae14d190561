"""Sends the learner's weights to the policy store's actor: what the store lacks, in chunks, within one deadline."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from actors.calls import unwrap
from distrl.errors import DeadlineError, LostWeightsError, RunError
from distrl.manifest import CHUNK_BYTES, cut, lay_out
from distrl.messages import Manifest, Offer

if TYPE_CHECKING:
    from torch import Tensor

CHUNKS_UNDER_WAY = 2
"""Chunks that are sent and not yet answered: the store takes one while the next is cut."""

RESTART_POLL_S = 0.2
"""Seconds between two attempts while the store's process is being restarted."""


class Publisher:
    """The learner's side of a publication.

    Args:
        store: handle of the policy store's actor.
        timeout_s: seconds that a whole publication may take, restarts of the store included.
        on_chunk: told the number of each chunk before it is sent. For tests that place an event between two.
    """

    def __init__(
        self,
        store: Any,
        timeout_s: float,
        chunk_bytes: int = CHUNK_BYTES,
        on_chunk: Callable[[int], None] = lambda index: None,
    ) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._chunk_bytes = chunk_bytes
        self._on_chunk = on_chunk

    def publish(self, manifest: Manifest, tensors: "Mapping[str, Tensor]", *, whole: bool = False) -> int:
        """Makes a version available in the store; returns the bytes that were sent.

        A store that is restarted meanwhile has lost what it had, and gets the whole policy.

        Args:
            whole: send every tensor, also those that the store says it has.
        Raises:
            DeadlineError: it took longer than the deadline. RunError: the store's process is gone for good.
            PolicyError: the store refused it.
        """

        def attempt(again: bool, deadline: float) -> int:
            return self._attempt(manifest, tensors, whole or again, deadline)

        return self._tried(manifest, attempt)

    def offer(self, manifest: Manifest, offer: Offer) -> None:
        """Tells the store of a version whose bytes are sent elsewhere; `publish` brings them here, too.

        Raises:
            DeadlineError, RunError, PolicyError: as `publish`.
        """

        def attempt(again: bool, deadline: float) -> int:
            ray.get(self._store.offer.remote(manifest, offer), timeout=max(0.0, deadline - time.monotonic()))
            return 0

        self._tried(manifest, attempt)

    def _tried(self, manifest: Manifest, attempt: Callable[[bool, float], int]) -> int:
        deadline = time.monotonic() + self._timeout_s
        again = False
        while True:
            try:
                return attempt(again, deadline)
            except (ActorUnavailableError, LostWeightsError):
                again = True
                if time.monotonic() + RESTART_POLL_S > deadline:
                    raise self._late(manifest) from None
                time.sleep(RESTART_POLL_S)
            except GetTimeoutError:
                raise self._late(manifest) from None
            except RayTaskError as error:
                raise unwrap(error, f"publishing {manifest.weights} version {manifest.version}") from error
            except (ActorDiedError, RayActorError) as error:
                raise RunError(
                    f"{manifest.weights} version {manifest.version} cannot be published: the process of policy-store "
                    "is gone"
                ) from error

    def _attempt(self, manifest: Manifest, tensors: "Mapping[str, Tensor]", whole: bool, deadline: float) -> int:
        def answer(reference: Any) -> Any:
            try:
                return ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
            except RayTaskError as error:
                if isinstance(error.cause, LostWeightsError):
                    raise error.cause from error
                raise

        names = None if whole else answer(self._store.wanted.remote(manifest))
        sent = [entry for entry in manifest.tensors if names is None or entry.name in names]
        layout = lay_out(sent, self._chunk_bytes)
        under_way: list[Any] = []
        for index, chunk in enumerate(cut(tensors, layout)):
            self._on_chunk(index)
            if len(under_way) == CHUNKS_UNDER_WAY:
                answer(under_way.pop(0))
            under_way.append(self._store.add_chunk.remote(manifest.weights, manifest.version, index, chunk))
        for reference in under_way:
            answer(reference)
        answer(self._store.publish.remote(manifest, layout))
        return sum(entry.bytes for entry in sent)

    def _late(self, manifest: Manifest) -> DeadlineError:
        return DeadlineError(
            f"policy-store must take {manifest.weights} version {manifest.version} from the learner within "
            f"limits.publish_timeout_s = {self._timeout_s:g} s, it did not; look at the log of policy-store"
        )
