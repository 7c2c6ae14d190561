"""The planes that need a GPU, as far as they go without one: they fit vLLM's engines, and say what is missing."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from distrl.errors import ConfigError
from tests.builders import refusal

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs these tests")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said where there is no GPU")


class Stage:
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        pass


class Client:
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        pass

    def update_weights(self, update_info: Any) -> None:
        pass


@pytest.mark.parametrize("plane", ["nccl", "ipc"])
def test_both_ends_refuse_to_begin_without_a_gpu(plane: Any) -> None:
    from actors.transfer.planes import receiving, sending

    message = (
        f"generation.transport must be store where a process of the transfer sees no GPU, got {plane}; give learner "
        "and generation actors GPUs, or set generation.transport=store"
    )
    assert refusal(ConfigError, lambda: receiving(plane, Stage(), 1.0)) == message
    assert refusal(ConfigError, lambda: sending(plane, Client(), "127.0.0.1", 1.0)) == message


@pytest.mark.parametrize("plane", ["nccl", "ipc"])
def test_vllm_makes_its_receiving_engine_from_what_it_is_given(plane: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.transfer.planes import receiving

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stage = Stage()
    made: Any = receiving(plane, stage, 1.0)
    assert made._engine.model is stage
    assert made._engine.device == torch.device("cuda", 0)


def test_what_is_handed_to_vllm_has_the_form_that_it_asks_for() -> None:
    from vllm.distributed.weight_transfer import VLLMWeightSyncClient, WeightSource

    from actors.transfer.device import _Driven, _Tensors

    assert isinstance(_Driven(Client()), VLLMWeightSyncClient)
    source = _Tensors()
    assert isinstance(source, WeightSource)
    source.tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(0, dtype=torch.bfloat16)}
    described = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
    assert described == [("a", torch.float32, (2, 3)), ("b", torch.bfloat16, (0,))]
