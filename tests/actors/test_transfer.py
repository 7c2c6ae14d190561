"""Weights over the fast way: real processes and a real collective, gloo in the place of NCCL, some of them killed."""

import asyncio
import hashlib
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client

import pytest
import torch
from torch import Tensor

from actors.engines.fake import FakeEngine
from actors.generation import Generation
from actors.policy_store import PolicyStore
from actors.recorder import Recorder
from actors.transfer.receiver import Receiver
from actors.transfer.sender import TransferSource
from actors.transfer.transport import Transport
from distrl.errors import DamagedWeightsError, DeadlineError, LostWeightsError, StageError
from distrl.manifest import describe, unpack
from distrl.messages import Chunk, Content, Delivery, Layout, Manifest, Offer
from tests.builders import refusal, run
from tests.system.in_process import PARAMS, Digits, send

PATIENCE_S = 60.0
"""Far more than anything here takes; a process that hangs is met by a shorter one."""


def weights(version: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {
        "a": torch.randn(64, 33, generator=generator),
        "b": torch.randn(5, generator=generator).bfloat16(),
        "c": torch.zeros(0, 3),
        "d": torch.arange(version, version + 7),
    }


def manifest_of(version: int) -> Manifest:
    return describe(weights(version), version=version, step=version)


@pytest.fixture
def source() -> Iterator[TransferSource]:
    found = TransferSource("gloo", "127.0.0.1", "node-0", PATIENCE_S)
    yield found
    found.close()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    found = Receiver("gloo", PATIENCE_S)
    yield found
    found.close()


@pytest.fixture(scope="module")
def other() -> Iterator[Receiver]:
    found = Receiver("gloo", PATIENCE_S)
    yield found
    found.close()


def put(source: TransferSource, version: int) -> Manifest:
    manifest = manifest_of(version)
    source.put(manifest, weights(version))
    return manifest


def received(receiver: Receiver, source: TransferSource, version: int, names: Sequence[str] = tuple("abcd")) -> None:
    """Receives a version and compares it with what it must be."""
    manifest = manifest_of(version)
    found = unpack(manifest, *receiver.receive(source.offer, manifest, names))
    assert found.keys() == set(names)
    assert all(torch.equal(found[name], weights(version)[name]) for name in names)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def test_versions_come_over_one_connection_and_only_the_tensors_that_were_asked_for(
    source: TransferSource, receiver: Receiver
) -> None:
    put(source, 1)
    received(receiver, source, 1)
    first = source.senders[0].pid
    put(source, 2)
    received(receiver, source, 2, ("d", "a"))
    assert [process.pid for process in source.senders] == [first]


def test_what_is_put_does_not_change_with_the_learners_tensors(source: TransferSource, receiver: Receiver) -> None:
    tensors = weights(1)
    copies = source.put(manifest_of(1), tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert all(torch.equal(copies[name], x) for name, x in weights(1).items())
    received(receiver, source, 1)


def test_a_version_that_is_no_longer_kept_is_refused_by_name(source: TransferSource, receiver: Receiver) -> None:
    for version in (1, 2):
        put(source, version)
    manifest = manifest_of(1)
    assert refusal(StageError, lambda: receiver.receive(source.offer, manifest, ["a"])) == (
        f"the learner, process {os.getpid()} on 127.0.0.1, must send policy version 1 over gloo, it did not: "
        "StageError: LostWeightsError: policy version 1 must be the one that the learner keeps to be sent, which is 2; "
        "take it from the policy store"
    )
    received(receiver, source, 2)


def test_a_byte_that_flips_on_the_way_is_refused_with_the_tensor(source: TransferSource, receiver: Receiver) -> None:
    manifest = put(source, 1)
    flip(source, 1)
    good = weights(1)["a"].numpy().tobytes()
    bad = bytes([good[0] ^ 1]) + good[1:]
    assert refusal(DamagedWeightsError, lambda: receiver.receive(source.offer, manifest, ["a", "b"])) == (
        f"policy version 1: tensor a must have sha256 {hashlib.sha256(good).hexdigest()}, got "
        f"{hashlib.sha256(bad).hexdigest()}; the bytes were damaged on the way, take the version from the policy store"
    )
    put(source, 2)
    received(receiver, source, 2)


def flip(source: TransferSource, version: int) -> None:
    """In the file that senders read: tensor a begins at 0."""
    index = json.loads((source._snapshots.directory / "policy").read_text())
    assert index["version"] == version
    with open(index["path"], "r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))


def test_a_sender_that_stops_costs_its_own_receiver_the_deadline_and_nobody_else_anything(
    source: TransferSource, receiver: Receiver, other: Receiver
) -> None:
    put(source, 1)
    received(receiver, source, 1)
    stopped = source.senders[0].pid
    received(other, source, 1)
    stop(stopped)
    manifest = put(source, 2)
    receiver._timeout_s = 1.0  # put back below
    messages: list[str] = []
    waiting = threading.Thread(
        target=lambda: messages.append(refusal(DeadlineError, lambda: receiver.receive(source.offer, manifest, ["a"])))
    )
    waiting.start()
    received(other, source, 2)
    waiting.join(PATIENCE_S)
    assert messages == [
        f"the learner, process {os.getpid()} on 127.0.0.1, must send policy version 2 over gloo within "
        "limits.transport_timeout_s = 1 s, it did not"
    ]
    # The process that waited in vain is gone; another one asks another sender.
    receiver._timeout_s = PATIENCE_S
    received(receiver, source, 2)
    assert source.senders[-1].pid != stopped
    os.kill(stopped, signal.SIGKILL)


def test_a_sender_that_is_killed_in_the_middle_ends_its_own_transfer_at_once(
    source: TransferSource, receiver: Receiver, other: Receiver
) -> None:
    put(source, 1)
    received(receiver, source, 1)
    victim = source.senders[0].pid
    received(other, source, 1)
    stop(victim)  # so that the request has come and no byte has gone
    manifest = put(source, 2)
    messages: list[str] = []
    waiting = threading.Thread(
        target=lambda: messages.append(refusal(StageError, lambda: receiver.receive(source.offer, manifest, ["a"])))
    )
    waiting.start()
    received(other, source, 2)
    assert waiting.is_alive()
    os.kill(victim, signal.SIGKILL)
    waiting.join(PATIENCE_S)
    assert len(messages) == 1
    assert messages[0].startswith(
        f"the learner, process {os.getpid()} on 127.0.0.1, must send policy version 2 over gloo, it did not: "
    )
    received(receiver, source, 2)


def test_a_receiver_that_is_killed_in_the_middle_ends_its_own_transfer_and_its_sender(
    source: TransferSource, receiver: Receiver, other: Receiver
) -> None:
    put(source, 1)
    received(receiver, source, 1)
    sender = source.senders[0]
    received(other, source, 1)
    stop(sender.pid)
    manifest = put(source, 2)
    messages: list[str] = []
    waiting = threading.Thread(
        target=lambda: messages.append(refusal(StageError, lambda: receiver.receive(source.offer, manifest, ["a"])))
    )
    assert receiver.process is not None
    pid = receiver.process.pid
    waiting.start()
    received(other, source, 2)
    os.kill(pid, signal.SIGKILL)
    waiting.join(PATIENCE_S)
    assert messages == [
        f"the learner, process {os.getpid()} on 127.0.0.1, was sending policy version 2 over gloo, and the receiving "
        "process ended"
    ]
    os.kill(sender.pid, signal.SIGCONT)
    sender.wait(PATIENCE_S)
    received(other, source, 2, ("d",))
    received(receiver, source, 2)


def test_a_stranger_and_one_who_stops_in_the_handshake_hold_up_nobody(
    source: TransferSource, receiver: Receiver
) -> None:
    offer = source.offer
    with pytest.raises(AuthenticationError):
        Client((offer.host, offer.port), authkey=b"another key")
    with socket.create_connection((offer.host, offer.port)):
        put(source, 1)
        received(receiver, source, 1)
    assert len(source.senders) == 1


def test_nobody_listens_any_more(receiver: Receiver) -> None:
    source = TransferSource("gloo", "127.0.0.1", "node-0", PATIENCE_S)
    manifest = put(source, 1)
    source.close()
    assert not source._snapshots.directory.exists()
    assert refusal(StageError, lambda: receiver.receive(source.offer, manifest, ["a"])) == (
        f"the learner, process {os.getpid()} on 127.0.0.1, must send policy version 1 over gloo, it did not: "
        "ConnectionRefusedError: [Errno 111] Connection refused"
    )


# How an actor chooses -----------------------------------------------------------------------------------------------


class Store:
    """A real policy store without Ray, and what was asked of it."""

    def __init__(self) -> None:
        self.store = PolicyStore(keep=2, put=lambda chunk: chunk)
        self.asked: list[bool] = []

    async def ask(self, version: int, have: Mapping[str, Content], weights: str, from_store: bool) -> Delivery:
        self.asked.append(from_store)
        return await self.store.fetch(version, have, weights, from_store)

    async def chunks(self, delivery: Delivery) -> list[Chunk]:
        return list(delivery.chunks)  # type: ignore[arg-type]

    def actor(self, receiver: "Receiver | Refusing", timeout_s: float = PATIENCE_S) -> Generation:
        transport = Transport(self.ask, self.chunks, receiver, "node-0", timeout_s)
        return Generation(
            "generation-0", {"policy": FakeEngine(policy=weights(0))}, Digits(), PARAMS, transport, transport=transport
        )


class Refusing:
    """A receiver that fails, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def receive(self, offer: Offer, manifest: Manifest, names: Sequence[str]) -> tuple[Layout, list[Chunk]]:
        self.asked += 1
        raise DeadlineError("nobody sends")

    def close(self) -> None:
        pass


def test_an_offered_version_comes_over_the_transport_and_only_what_changed(
    source: TransferSource, receiver: Receiver
) -> None:
    async def scenario() -> None:
        store = Store()
        actor = store.actor(receiver)
        manifest = put(source, 1)
        await store.store.offer(manifest, source.offer)
        first = await actor.pull(1)
        assert (first.version, first.transport, first.fallback) == (1, "gloo", None)
        assert first.moved_bytes == 64 * 33 * 4 + 5 * 2 + 7 * 8
        tensors = {**weights(1), "d": torch.arange(7)}
        manifest = describe(tensors, version=2, step=2)
        source.put(manifest, tensors)
        await store.store.offer(manifest, source.offer)
        second = await actor.pull(2)
        assert (second.transport, second.moved_tensors, second.moved_bytes) == ("gloo", 1, 7 * 8)
        assert store.asked == [False, False]

    run(scenario())


def test_a_version_that_is_damaged_on_the_way_comes_from_the_store_and_that_is_recorded(
    source: TransferSource, receiver: Receiver
) -> None:
    async def scenario() -> None:
        store, recorder = Store(), Recorder(None, lambda: 0.0)
        actor = store.actor(receiver)
        manifest = put(source, 1)
        flip(source, 1)
        await store.store.offer(manifest, source.offer)
        await send(store.store, weights(1), version=1, step=1)
        receipt = await actor.pull(1)
        assert await actor.policy_version() == 1
        assert receipt.transport == "store"
        assert receipt.fallback is not None
        assert receipt.fallback.startswith("policy version 1: tensor a must have sha256 ")
        recorder.load("generation-0", receipt)
        load, event = recorder.after(-1)
        assert (load["kind"], load["fallback"]) == ("load", receipt.fallback)
        assert (event["kind"], event["message"]) == (
            "transport_fallback",
            f"generation-0 took policy from the store: {receipt.fallback}",
        )
        # The next version is tried over the transport again.
        await store.store.offer(put(source, 2), source.offer)
        assert (await actor.pull(2)).transport == "gloo"

    run(scenario())


def test_after_a_failed_transfer_an_actor_waits_for_the_stores_bytes_and_asks_the_peer_no_more() -> None:
    async def scenario() -> None:
        store, refusing = Store(), Refusing()
        actor = store.actor(refusing)
        offer = Offer("nccl", "10.0.0.1", 1, b"", "node-1", 7)
        await store.store.offer(manifest_of(1), offer)
        pull = asyncio.create_task(actor.pull(1))
        while True not in store.asked:
            await asyncio.sleep(0)
        assert not pull.done()
        await send(store.store, weights(1), version=1, step=1)
        receipt = await pull
        assert (receipt.transport, receipt.fallback) == ("store", "nobody sends")
        assert refusing.asked == 1

    run(scenario())


def test_where_the_store_never_gets_the_bytes_the_version_counts_as_lost_and_the_next_attempt_asks_the_store() -> None:
    async def scenario() -> None:
        store, refusing = Store(), Refusing()
        actor = store.actor(refusing, timeout_s=0.0)
        await store.store.offer(manifest_of(1), Offer("nccl", "10.0.0.1", 1, b"", "node-1", 7))
        with pytest.raises(LostWeightsError) as caught:
            await actor.pull(1)
        assert str(caught.value) == (
            "generation-0 keeps policy version 0: policy version 1 must have its bytes in the store, tensor a is only "
            "offered by the learner; wait for it"
        )
        await send(store.store, weights(1), version=1, step=1)
        receipt = await actor.pull(1)
        assert (receipt.version, receipt.fallback, refusing.asked) == (1, "nobody sends", 1)

    run(scenario())


def test_ipc_does_not_leave_a_machine() -> None:
    async def scenario() -> None:
        store, refusing = Store(), Refusing()
        actor = store.actor(refusing)
        await store.store.offer(manifest_of(1), Offer("ipc", "10.0.0.1", 1, b"", "node-1", 7))
        await send(store.store, weights(1), version=1, step=1)
        assert (await actor.pull(1)).fallback == (
            "policy version 1 over ipc must come from the same machine, the learner is on 10.0.0.1; set "
            "generation.transport=nccl, or let the run have one machine"
        )
        assert refusing.asked == 0

    run(scenario())
