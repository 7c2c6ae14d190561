"""Weights that are offered, through Ray's real processes: they come from the learner's machine, and where the sender
stops, from the store."""

import os
import signal
from collections.abc import Iterator

import pytest
import ray
import torch
from torch import Tensor

from actors.engines.fake import FakeEngine
from actors.generation import Generation
from actors.transfer.receiver import Receiver
from actors.transfer.sender import TransferSource
from actors.transfer.transport import Transport
from deploy.offering import OfferingPublisher
from deploy.publisher import Publisher
from deploy.remote.generation import StoreSource
from deploy.remote.policy_store import PolicyStoreActor
from deploy.start import start_ray
from distrl.manifest import describe
from distrl.messages import LoadReceipt
from tests.system.in_process import PARAMS, Digits

pytestmark = pytest.mark.ray

PATIENCE_S = 60.0
"""What a test allows for things that have no deadline of their own here; nothing is expected to take it."""
DEADLINE_S = 3.0


class Sampler(Generation):
    def __init__(self, store: object) -> None:
        source = StoreSource("generation-0", store, PATIENCE_S)
        self._receiver = Receiver("gloo", PATIENCE_S)
        transport = Transport(source.ask, source.chunks, self._receiver, "", PATIENCE_S)
        super().__init__("generation-0", {"policy": FakeEngine()}, Digits(), PARAMS, source.fetch, transport=transport)

    @ray.method
    async def hurry(self) -> None:
        self._receiver._timeout_s = DEADLINE_S


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    start_ray()
    yield
    ray.shutdown()


def weights(version: int) -> dict[str, Tensor]:
    return {"changes": torch.full((1000,), float(version)), "stays": torch.arange(10)}


def test_an_offered_version_is_pulled_and_a_stopped_sender_costs_its_deadline(running_ray: None) -> None:
    store = ray.remote(PolicyStoreActor).options(num_cpus=0).remote()
    sampler = ray.remote(Sampler).options(num_cpus=0).remote(store)
    source = TransferSource("gloo", "127.0.0.1", "", PATIENCE_S)
    publisher = OfferingPublisher(Publisher(store, PATIENCE_S), source)

    def pulled(version: int) -> LoadReceipt:
        tensors = weights(version)
        publisher.publish(describe(tensors, version=version, step=version), tensors)
        receipt: LoadReceipt = ray.get(sampler.pull.remote(version, "policy"), timeout=PATIENCE_S)
        return receipt

    try:
        first = pulled(1)
        assert (first.transport, first.fallback, first.moved_bytes) == ("gloo", None, 4080)
        second = pulled(2)
        assert (second.transport, second.moved_bytes) == ("gloo", 4000)
        ray.get(sampler.hurry.remote(), timeout=PATIENCE_S)
        os.kill(source.senders[0].pid, signal.SIGSTOP)
        third = pulled(3)
        assert (third.version, third.transport, third.moved_bytes) == (3, "store", 4000)
        assert third.fallback == (
            f"the learner, process {os.getpid()} on 127.0.0.1, must send policy version 3 over gloo within "
            "limits.transport_timeout_s = 3 s, it did not"
        )
        assert ray.get(sampler.policy_version.remote("policy"), timeout=PATIENCE_S) == 3
    finally:
        publisher.finish()
        publisher.close()
        ray.get(sampler.close.remote(), timeout=PATIENCE_S)
