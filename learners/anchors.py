"""Models that follow the policy, kept where its weights are: moving averages, snapshots, resets.

An anchor is a copy of the policy's parameters (on a worker with shards, of its shards) that changes only after an
optimizer step. Anchors with the same upkeep are one copy. They are scored by putting them into the model for one
forward pass, so that they need no model of their own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from distrl.objectives.upkeep import EMA, Frozen, Mixture, Reset, Snapshot, Upkeep

STEP = "step"
"""Of an anchor in a checkpoint, the entry that is no parameter."""


class Anchors:
    """The anchors of one recipe.

    Args:
        model: whose parameters are followed; its state now is that of every anchor.
        upkeep: by model name, as in `Recipe.upkeep`. Of a `Mixture` only the part that follows the policy is kept here:
            the policy itself.
        optimizer: whose state a `Reset` empties.
    """

    def __init__(self, model: nn.Module, upkeep: Mapping[str, Upkeep], optimizer: torch.optim.Optimizer) -> None:
        self._parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
        # A frozen model is scored where it lies: it may be another one than the policy's start.
        upkeep = {name: kept for name, kept in upkeep.items() if not isinstance(kept, Frozen)}
        self._upkeep = upkeep
        self._optimizer = optimizer
        # Equal upkeep is one copy, and the policy itself none.
        copied = dict.fromkeys(kept for kept in upkeep.values() if not isinstance(kept, Mixture))
        self._weights: dict[Upkeep, dict[str, Tensor]] = {kept: self._copy() for kept in copied}
        self._changed = {kept: torch.zeros((), dtype=torch.int64) for kept in upkeep.values()}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._upkeep)

    def after_step(self, step: int) -> None:
        """Follows the policy, which optimizer step number `step` has just changed."""
        for kept, changed in self._changed.items():
            if not _moves(kept, step):
                continue
            changed.fill_(step)
            weights = self._weights.get(kept)
            if weights is None:
                continue
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    share = kept.rate if isinstance(kept, EMA) else 1.0
                    # lerp is exact at both ends: a share of 1 copies.
                    weights[name].lerp_(parameter.detach(), share)
            if isinstance(kept, Reset):
                self._optimizer.state.clear()

    @contextmanager
    def in_place_of_the_policy(self, name: str) -> Iterator[None]:
        """The model has an anchor's weights inside; the policy's are back after it, to the bit."""
        weights = self._weights.get(self._upkeep[name])
        if weights is None:
            yield
            return
        policy = self._copy()
        self._put(weights)
        try:
            yield
        finally:
            self._put(policy)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps and restores in place: by anchor its weights, and when they last changed."""
        return {name: {**self._weights.get(kept, {}), STEP: self._changed[kept]} for name, kept in self._upkeep.items()}

    def move(self, place: Callable[[Tensor], Tensor]) -> None:
        """Puts the weights elsewhere; when they changed stays on the CPU."""
        self._weights = {
            kept: {name: place(tensor) for name, tensor in weights.items()} for kept, weights in self._weights.items()
        }

    def changed(self, name: str) -> int:
        """The optimizer step after which an anchor last changed; 0 is the start."""
        return int(self._changed[self._upkeep[name]])

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for module in self._shards:
            module.reshard()  # what a pass without gradients has left gathered would be used by the next one as it is
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])


def _moves(kept: Upkeep, step: int) -> bool:
    if isinstance(kept, Snapshot):
        return step % int(kept.every * kept.times) == 0
    if isinstance(kept, Reset):
        return step % int(kept.every) == 0
    return True
