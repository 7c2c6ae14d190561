"""The planes that need GPUs: vLLM's own weight-transfer engines for NCCL and CUDA IPC, as they are.

Only this module needs a GPU. It runs in the sender and receiver processes, never in the learner, a generation actor or
vLLM's processes.
"""

import socket
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import (
    ParamMeta,
    WeightSource,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from actors.transfer.planes import Client, Plane, Stage
from distrl.errors import ConfigError

BUFFER_BYTES = 256 << 20
"""Of device memory per buffer; NCCL has two on each side, IPC has one that holds the largest tensor at least."""


class _Tensors(WeightSource):  # type: ignore[misc]
    """The tensors of one update, copied to the device one at a time."""

    def __init__(self) -> None:
        self.tensors: Mapping[str, Tensor] = {}

    def metadata(self) -> list[Any]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors.items():
            yield name, tensor.cuda()


class _Driven:
    """The client that vLLM's trainer engine calls; beginning and end of an update are the generation actor's matter."""

    def __init__(self, client: Client) -> None:
        self.init_weight_transfer_engine = client.init_weight_transfer_engine
        self.update_weights = client.update_weights

    def start_weight_update(self) -> None:
        pass

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass


class DeviceSending:
    """vLLM's trainer engine, the first of a group of two."""

    def __init__(self, plane: Plane, client: Client, host: str) -> None:
        _check_device(plane)
        self._source = _Tensors()
        info: Any
        if plane == "nccl":
            port = _free_port(host)
            info = NCCLTrainerInitInfo(
                rank=0, master_address=host, master_port=port, world_size=2, packed_buffer_size_bytes=BUFFER_BYTES
            )
        else:
            info = IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=BUFFER_BYTES)
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=_Driven(client), source=self._source)

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        self._source.tensors = tensors
        # IPC refuses a tensor that is larger than its buffer; NCCL's is agreed on at the start and may be exceeded.
        if not hasattr(self._engine, "packed_num_buffers"):
            self._engine.packed_buffer_size_bytes = max(BUFFER_BYTES, *(x.nbytes for x in tensors.values()))
        self._engine.send_weights()


class DeviceReceiving:
    """vLLM's worker engine, whose model is the stage: what it would load, the stage copies and verifies."""

    def __init__(self, plane: Plane, stage: Stage) -> None:
        _check_device(plane)
        alone = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        self._engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=plane),
            SimpleNamespace(parallel_config=alone, model_config=None),
            torch.device("cuda", torch.cuda.current_device()),
            stage,
        )

    def init(self, info: dict[str, Any]) -> None:
        self._engine.init_transfer_engine(self._engine.parse_init_info(info))

    def update(self, info: dict[str, Any]) -> None:
        self._engine.update_weights(info)


def _check_device(plane: Plane) -> None:
    if not torch.cuda.is_available():
        raise ConfigError(
            f"generation.transport must be store where a process of the transfer sees no GPU, got {plane}; give "
            "learner and generation actors GPUs, or set generation.transport=store"
        )


def _free_port(host: str) -> int:
    with socket.socket() as found:
        found.bind((host, 0))
        return int(found.getsockname()[1])
