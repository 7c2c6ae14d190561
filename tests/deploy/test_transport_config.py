"""A way of new weights that its ends cannot take is refused with the key; the store is told of what is offered."""

import threading
from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor, ones

from deploy.check_gpus import check_transport
from deploy.offering import OfferingPublisher
from distrl.config import Config, make_config
from distrl.errors import ConfigError, DeadlineError
from distrl.manifest import describe
from distrl.messages import Manifest, Offer
from tests.builders import refusal


def config(**sections: Mapping[str, Any]) -> Config:
    return make_config({"model": {"path": "m"}, "data": {"source": "sort_digits"}, **sections})


NCCL = {"engine": "vllm", "transport": "nccl"}
IPC = {"engine": "vllm", "transport": "ipc"}
GPU = {"device": "cuda"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"generation": {"transport": "nccl"}},
            "generation.transport must be store for generation.engine transformers, which has no GPU, got nccl; leave "
            "it out, or take the engine vllm",
        ),
        (
            {"generation": NCCL},
            "generation.transport must be store where train.device is cpu, got nccl; the bytes go from the learner's "
            "GPU: leave it out, or set train.device=cuda",
        ),
        (
            {"generation": NCCL, "train": GPU, "placement": {"mode": "shared"}},
            "generation.transport nccl needs placement.mode separate, got shared; a group of NCCL has each process on "
            "a GPU of its own: set placement.mode=separate, or leave generation.transport out",
        ),
        (
            {"generation": IPC, "train": GPU, "placement": {"mode": "separate"}},
            "generation.transport ipc needs placement.mode shared, got separate; CUDA IPC shares memory of one GPU "
            "that both are on at the same time: set placement.mode=shared, or leave generation.transport out",
        ),
        (
            {
                "generation": NCCL,
                "train": GPU,
                "placement": {"mode": "separate"},
                "limits": {"transport_timeout_s": 60, "sync_timeout_s": 120},
            },
            "limits.transport_timeout_s must be less than half of limits.sync_timeout_s (120), got 60; what is late "
            "must have time left to come from the store",
        ),
    ],
)
def test_a_way_that_cannot_be_taken_is_refused(sections: Mapping[str, Any], message: str) -> None:
    assert refusal(ConfigError, lambda: check_transport(config(**sections))) == message


def test_ways_that_fit_the_placement_are_taken() -> None:
    check_transport(config())
    check_transport(config(generation=NCCL, train=GPU, placement={"mode": "separate"}))
    check_transport(config(generation=IPC, train=GPU, placement={"mode": "shared"}))


class Recorded:
    """A publisher and a source that keep what they are told; an upload waits until it may begin."""

    offer_of_source = Offer("gloo", "here", 1, b"", "", 2)

    def __init__(self) -> None:
        self.told: list[tuple[str, int, bool]] = []
        self.may_upload = threading.Event()
        self.fails: Exception | None = None

    def publish(self, manifest: Manifest, tensors: Mapping[str, Tensor], *, whole: bool = False) -> int:
        assert self.may_upload.wait(30)
        if self.fails is not None:
            raise self.fails
        self.told.append(("publish", int(tensors["w"][0]), whole))
        return 0

    def offer(self, manifest: Manifest, offer: Offer) -> None:
        self.told.append(("offer", manifest.version, False))


class Source:
    offer = Recorded.offer_of_source
    closed = False

    def put(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def close(self) -> None:
        self.closed = True


def publish(publisher: OfferingPublisher, version: int, *, again: bool = False) -> dict[str, Tensor]:
    tensors = {"w": ones(3) * version}
    publisher.publish(describe(tensors, version=version, step=version), tensors, again=again)
    return tensors


def test_a_version_is_offered_before_its_bytes_are_in_the_store_and_these_are_as_they_were() -> None:
    recorded = Recorded()
    publisher = OfferingPublisher(recorded, Source())
    publish(publisher, 1)["w"].zero_()  # the learner trains on
    assert recorded.told == [("offer", 1, False)]
    recorded.may_upload.set()
    publish(publisher, 2)
    publisher.finish()
    assert recorded.told == [("offer", 1, False), ("publish", 1, False), ("offer", 2, False), ("publish", 2, False)]
    publisher.close()


def test_weights_that_the_store_has_lost_go_there_whole_before_anything_else() -> None:
    recorded = Recorded()
    recorded.may_upload.set()
    publisher = OfferingPublisher(recorded, Source())
    publish(publisher, 1)
    publish(publisher, 1, again=True)
    assert recorded.told == [("offer", 1, False), ("publish", 1, False), ("publish", 1, True)]
    publisher.close()


def test_bytes_that_did_not_reach_the_store_end_the_next_publication() -> None:
    recorded, source = Recorded(), Source()
    recorded.may_upload.set()
    recorded.fails = DeadlineError("policy-store must take policy version 1, it did not")
    publisher = OfferingPublisher(recorded, source)
    publish(publisher, 1)
    assert refusal(DeadlineError, lambda: publish(publisher, 2)) == str(recorded.fails)
    assert recorded.told == [("offer", 1, False)]
    publisher.close()
    assert source.closed
