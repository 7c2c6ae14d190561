"""Key-value cache with one slot per row, in which a row's numbers do not depend on its slot or its neighbors.

Shape suffixes: S slots, R rows of a forward pass, P prompts of a prefill, T positions, H heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

POSITION_BUCKET = 16
"""Positions attended over are rounded up to a multiple of this.

The CPU attention kernel takes 16 floats at a time and the rest one by one with another exponential; with whole
vectors a masked tail of any length adds exactly 0.
"""

LayerStates = tuple[Tensor, Tensor]
"""Keys and values that a prefill left in one layer, [P, H, T, D] each."""


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class SlotLayer(CacheLayerMixin):
    """Keys and values of one attention layer, [S, T, H, D]; a row's token at position t is always at index t."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, slots: int, layout: LayerStates) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = (states.new_zeros((slots, 0, states.shape[1], states.shape[3])) for states in layout)
        self.is_initialized = True
        self._flat_R = torch.empty(0, dtype=torch.int64)
        self._length = 0

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` positions per slot; what is there is kept."""
        if capacity > self.keys.shape[1]:
            self.keys, self.values = _grown(self.keys, capacity), _grown(self.values, capacity)

    def aim(self, positions_R: Tensor, length: int) -> None:
        """Let the next update write row r to position `positions_R[r]` of slot r, and return `length` positions."""
        first_R = torch.arange(len(positions_R), device=positions_R.device) * self.keys.shape[1]
        self._flat_R, self._length = first_R + positions_R, length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> LayerStates:
        """Write one token per row ([R, H, 1, D]) and return views [R, H, length, D]."""
        return self._updated(self.keys, key_states), self._updated(self.values, value_states)

    def _updated(self, memory: Tensor, states: Tensor) -> Tensor:
        memory.flatten(0, 1).index_copy_(0, self._flat_R, states[:, :, 0])
        return memory[: len(states), : self._length].transpose(1, 2)

    def fill(self, slots: Tensor, prompts: Tensor, states: LayerStates) -> None:
        """Copy prompt `prompts[i]` to the first positions of slot `slots[i]`."""
        keys, values = (state.transpose(1, 2)[prompts] for state in states)
        self.keys[slots, : keys.shape[1]] = keys
        self.values[slots, : values.shape[1]] = values

    def move(self, sources: Tensor, targets: Tensor) -> None:
        self.keys[targets] = self.keys[sources]
        self.values[targets] = self.values[sources]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the memory is there from the start."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return self.keys.shape[1]


class SlotCache(Cache):
    """One `SlotLayer` per attention layer; grows with the longest row, so an unused context costs no memory."""

    layers: list[SlotLayer]  # type: ignore[assignment]

    def __init__(self, slots: int, context_length: int) -> None:
        super().__init__(layers=[])
        self._slots = slots
        self._longest = round_up(context_length, POSITION_BUCKET)
        self._capacity = 0

    def fill(self, slots: Tensor, prompts: Tensor, states: list[LayerStates]) -> None:
        """Copy prompt `prompts[i]` of a prefill to the first positions of slot `slots[i]`."""
        if not self.layers:
            # Only now are the heads of a layer known without knowing the model's config.
            self.layers = [SlotLayer(self._slots, layout) for layout in states]
        self._reserve(states[0][0].shape[2])
        for layer, layer_states in zip(self.layers, states, strict=True):
            layer.fill(slots, prompts, layer_states)

    def aim(self, positions_R: Tensor, length: int) -> None:
        """Prepare a decode step: row r writes to `positions_R[r]` of slot r, all see positions 0..length-1."""
        self._reserve(length)
        for layer in self.layers:
            layer.aim(positions_R, length)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole slots; no slot is both a source and a target."""
        for layer in self.layers:
            layer.move(sources, targets)

    def _reserve(self, length: int) -> None:
        if length > self._capacity:
            # Twice as much: growing bucket by bucket would copy everything every 16 steps.
            self._capacity = min(self._longest, max(length, 2 * self._capacity))
            for layer in self.layers:
                layer.reserve(self._capacity)


def _grown(memory: Tensor, capacity: int) -> Tensor:
    # Zeros, not empty memory: a NaN left there would survive its attention weight of 0.
    grown = memory.new_zeros((memory.shape[0], capacity, *memory.shape[2:]))
    grown[:, : memory.shape[1]] = memory
    return grown
