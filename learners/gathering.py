"""The policy's whole tensors, one after the other, from however many workers hold parts of them."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from distrl.lora import adapters, merged
from distrl.weights import policy_tensors


def whole_tensors(model: Any, wanted: bool, *, kept: bool = False) -> dict[str, Tensor]:
    """The tensors that make up the policy, with adapters merged, under the names of the model without them.

    Every worker calls it; where nothing is sharded they are the model's own, not copies. No worker that does not want
    them holds more than one whole tensor at a time.

    Args:
        kept: copies in main memory, which stay as they are while the model is trained. No device holds more than one
            whole tensor at a time then.
    """
    return _chosen(merged(policy_tensors(model), model, _whole), wanted, kept)


def whole_adapters(model: Any, wanted: bool, *, kept: bool = False) -> dict[str, Tensor]:
    """The adapters alone, as `whole_tensors`."""
    return _chosen(adapters(policy_tensors(model), _whole), wanted, kept)


def _chosen(tensors: Iterable[tuple[str, Tensor]], wanted: bool, kept: bool) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors:  # all of them: gathering one takes every worker
        if wanted:
            found[name] = tensor.to("cpu", copy=True) if kept else tensor
    return found


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
