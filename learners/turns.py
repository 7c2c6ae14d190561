"""Takes all that a learner keeps to a device and back, for a device that it has by turns with others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from learners.anchors import Anchors


@contextmanager
def on_device(
    device: torch.device, policy: nn.Module, optimizer: torch.optim.Optimizer, anchors: Anchors
) -> Iterator[None]:
    """Everything is on the device inside, and on the CPU with the device's memory given back afterwards.

    What stays on the device is what CUDA itself keeps for a process, a few hundred megabytes.
    """
    try:
        move(lambda tensor: tensor.to(device), policy, optimizer, anchors)
        yield
    finally:
        move(lambda tensor: tensor.cpu(), policy, optimizer, anchors)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def move(
    place: Callable[[Tensor], Tensor], policy: nn.Module, optimizer: torch.optim.Optimizer, anchors: Anchors
) -> None:
    """Puts parameters, buffers, gradients, the optimizer's state and anchors elsewhere.

    Parameters stay the same objects, because the optimizer knows them by identity.

    Args:
        place: the tensor where it is to be.
    """
    for tensor in (*policy.parameters(), *policy.buffers()):
        tensor.data = place(tensor.data)
        if tensor.grad is not None:
            tensor.grad = place(tensor.grad)
    for state in optimizer.state.values():
        for name, value in state.items():
            # AdamW counts its steps on the CPU wherever the rest is.
            if isinstance(value, Tensor) and name != "step":
                state[name] = place(value)
    anchors.move(place)
