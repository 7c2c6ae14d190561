"""Published low-rank adapters become weights: each is added to the frozen weight that an engine started from."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distrl.lora import AdapterLayer, adapter_names
from distrl.weights import check_policy

REMEDY = "publish the adapters of the same model with the same lora.rank and lora.targets"


class Adapters:
    """The frozen weights of one engine, and the adapters that were last added to them.

    Every version is made from the frozen weights, never from the version before: what rounding does to one version is
    not in the next.

    Args:
        base: the frozen weights, which nobody may change: those of the layers at least, and all of them where the
            engine does not load some alone or may forget what it has.
        layers: the layers with adapters, by name.
        loads_changes: see `distrl.sampling.Engine`.
    """

    def __init__(self, base: Mapping[str, Tensor], layers: Mapping[str, AdapterLayer], *, loads_changes: bool) -> None:
        self._base = base
        self._layers = layers
        self._loads_changes = loads_changes
        self._held: dict[str, Tensor] = {}
        self._expected = {
            name: torch.empty(shape, device="meta")
            for path, layer in layers.items()
            for name, shape in zip(adapter_names(path), (layer.a_shape, layer.b_shape), strict=True)
        }

    def merged(self, version: int, tensors: Mapping[str, Tensor], *, changed_only: bool) -> dict[str, Tensor]:
        """What the engine has to load so that it has these adapters and no others.

        Args:
            tensors: A and B of the layers, by `distrl.lora.adapter_names`.
            changed_only: `tensors` may lack those that are the same as at the last `loaded`.
        Raises:
            PolicyError: an adapter is missing, unknown or misshapen.
        """
        held = {**self._held, **tensors} if changed_only else tensors
        check_policy(version, self._expected, held, remedy=REMEDY)
        whole = not (changed_only and self._loads_changes)
        weights = dict(self._base) if whole else {}
        for path, layer in self._layers.items():
            a, b = adapter_names(path)
            if whole or a in tensors or b in tensors:
                name = f"{path}.weight"
                weights[name] = layer.added(self._base[name], held[a], held[b])
        return weights

    def loaded(self, tensors: Mapping[str, Tensor]) -> None:
        """The engine has what `merged` made of these adapters."""
        self._held.update(tensors)
