"""How bytes get from a sender to a receiver. `nccl` and `ipc` are vLLM's weight-transfer engines; `gloo` needs no GPU.

The two sides of a plane have the form of vLLM's: the sending one drives, and calls the receiving one through a client.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

Plane = Literal["gloo", "nccl", "ipc"]

_PLANES: Mapping[str, Plane] = {"gloo": "gloo", "nccl": "nccl", "ipc": "ipc"}


def known_plane(name: str) -> Plane:
    return _PLANES[name]


def prepare(plane: Plane) -> None:
    """Imports what takes long."""
    if plane != "gloo":
        import actors.transfer.device  # noqa: F401


class Client(Protocol):
    """What a sending side calls at the receiving one; each returns when it is done there."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...


class Stage(Protocol):
    """Takes tensors as they arrive; must copy what it keeps."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...


class Sending(Protocol):
    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Sends tensors of the CPU; returns when the other side has them."""
        ...


class Receiving(Protocol):
    def init(self, info: dict[str, Any]) -> None:
        """Meets the sending side."""
        ...

    def update(self, info: dict[str, Any]) -> None:
        """Gives the stage what is sent."""
        ...


def sending(plane: Plane, client: Client, host: str, timeout_s: float) -> Sending:
    """The sending side, once it has met the other.

    Args:
        host: this machine's address for the other side.
        timeout_s: of each wait, where the plane can bound one.
    """
    if plane == "gloo":
        return GlooSending(client, host, timeout_s)
    from actors.transfer.device import DeviceSending

    return DeviceSending(plane, client, host)


def receiving(plane: Plane, stage: Stage, timeout_s: float) -> Receiving:
    """The receiving side."""
    if plane == "gloo":
        return GlooReceiving(stage, timeout_s)
    from actors.transfer.device import DeviceReceiving

    return DeviceReceiving(plane, stage)


class GlooSending:
    """Rank 0 of a group of two."""

    def __init__(self, client: Client, host: str, timeout_s: float) -> None:
        self._client = client
        limit = timedelta(seconds=timeout_s)
        store = TCPStore(host, 0, 2, is_master=True, timeout=limit, wait_for_workers=False)
        with ThreadPoolExecutor(1) as beside:
            met = beside.submit(client.init_weight_transfer_engine, {"host": host, "port": store.port})
            self._group = distributed.ProcessGroupGloo(store, 0, 2, limit)
            met.result()

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        described = [(name, str(x.dtype).removeprefix("torch."), list(x.shape)) for name, x in tensors.items()]
        with ThreadPoolExecutor(1) as beside:
            taken = beside.submit(self._client.update_weights, {"tensors": described})
            for tensor in tensors.values():
                _broadcast(self._group, tensor)
            taken.result()


class GlooReceiving:
    """Rank 1 of a group of two."""

    def __init__(self, stage: Stage, timeout_s: float) -> None:
        self._stage = stage
        self._limit = timedelta(seconds=timeout_s)
        self._group: Any = None

    def init(self, info: dict[str, Any]) -> None:
        store = TCPStore(info["host"], info["port"], 2, is_master=False, timeout=self._limit)
        self._group = distributed.ProcessGroupGloo(store, 1, 2, self._limit)

    def update(self, info: dict[str, Any]) -> None:
        described: Sequence[tuple[str, str, list[int]]] = info["tensors"]
        for name, dtype, shape in described:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            _broadcast(self._group, tensor)
            self._stage.load_weights([(name, tensor)])


def _broadcast(group: Any, tensor: Tensor) -> None:
    if tensor.numel():
        # As bytes: gloo does not know every dtype.
        group.broadcast([tensor.reshape(-1).view(torch.uint8)]).wait()
