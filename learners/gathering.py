"""The policy's whole tensors, one after the other, from however many workers hold parts of them."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from distrl.lora import adapters, merged
from distrl.weights import policy_tensors


def whole_tensors(model: Any, wanted: bool) -> dict[str, Tensor]:
    """The tensors that make up the policy, with adapters merged, under the names of the model without them.

    Every worker calls it; where nothing is sharded they are the model's own, not copies. No worker that does not want
    them holds more than one whole tensor at a time.
    """
    found = {}
    for name, tensor in merged(policy_tensors(model), model, _whole):
        if wanted:
            found[name] = tensor
    return found


def whole_adapters(model: Any, wanted: bool) -> dict[str, Tensor]:
    """The adapters alone, as `whole_tensors`."""
    return {name: tensor for name, tensor in adapters(policy_tensors(model), _whole) if wanted}


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
