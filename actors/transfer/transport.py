"""How a generation actor gets a version: over the fast way where the learner offers one, else from the store."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from distrl.errors import DistrlError, LostWeightsError, StageError
from distrl.messages import Chunk, Content, Delivery, Layout, Manifest, Offer

POLL_S = 0.2
"""Seconds between two questions whether the store has the bytes of a version that is offered."""

Ask = Callable[[int, Mapping[str, Content], str, bool], Awaitable[Delivery]]
"""version, what is here, weights, whether the bytes must come from the store; see `PolicyStore.fetch`."""


class Receives(Protocol):
    """See `actors.transfer.receiver.Receiver`."""

    def receive(self, offer: Offer, manifest: Manifest, names: Sequence[str]) -> tuple[Layout, list[Chunk]]: ...

    def close(self) -> None: ...


class Transport:
    """A `Fetch` that tries an offer once per version.

    Args:
        ask: the policy store.
        chunks: fetches the bytes that a delivery names.
        node: Ray's id of this machine; IPC does not leave one.
        timeout_s: seconds to wait for the store's bytes of a version that could not be received.
    """

    def __init__(
        self,
        ask: Ask,
        chunks: Callable[[Delivery], Awaitable[list[Chunk]]],
        receiver: Receives,
        node: str,
        timeout_s: float,
    ) -> None:
        self._ask = ask
        self._chunks = chunks
        self._receiver = receiver
        self._node = node
        self._timeout_s = timeout_s
        self._refused: dict[str, tuple[int, str]] = {}
        self.last: tuple[str, str | None] = ("store", None)
        """The way of the newest version, and why it was not the one that was offered."""

    async def __call__(
        self, weights: str, version: int, have: Mapping[str, Content]
    ) -> tuple[Manifest, Layout, Sequence[Chunk]]:
        tried, cause = self._refused.get(weights, (-1, None))
        if tried != version:
            cause = None
            delivery = await self._ask(version, have, weights, False)
            if delivery.offer is None:
                self.last = ("store", None)
                return delivery.manifest, delivery.layout, await self._chunks(delivery)
            try:
                layout, chunks = await asyncio.to_thread(self._receive, delivery.offer, delivery.manifest, have)
            except (DistrlError, OSError) as error:
                cause = str(error)
                self._refused[weights] = (version, cause)
            else:
                self.last = (delivery.offer.transport, None)
                return delivery.manifest, layout, chunks
        delivery = await self._from_store(version, have, weights)
        self.last = ("store", cause)
        return delivery.manifest, delivery.layout, await self._chunks(delivery)

    def close(self) -> None:
        self._receiver.close()

    def _receive(self, offer: Offer, manifest: Manifest, have: Mapping[str, Content]) -> tuple[Layout, list[Chunk]]:
        if offer.transport == "ipc" and offer.node != self._node:
            raise StageError(
                f"{manifest.weights} version {manifest.version} over ipc must come from the same machine, the learner "
                f"is on {offer.host}; set generation.transport=nccl, or let the run have one machine"
            )
        names = [entry.name for entry in manifest.tensors if have.get(entry.name) != entry.content]
        return self._receiver.receive(offer, manifest, names)

    async def _from_store(self, version: int, have: Mapping[str, Content], weights: str) -> Delivery:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                return await self._ask(version, have, weights, True)
            except LostWeightsError:
                # The learner sends them there after the offer.
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(POLL_S)
