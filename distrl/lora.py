"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) by peft: W + alpha / rank B A, of which B and A are trained."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distrl.errors import ConfigError

NAME = "default"

Publish = Literal["merged", "adapter"]
"""What is published of a model with adapters: its weights with them added, or they alone."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """See `distrl.config_sections.LoraConfig`."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    """Names of linear layers; empty takes all but the output layer."""


def add_adapters(model: Any, settings: LoraSettings, seed: int) -> None:
    """Puts adapters into a Hugging Face model and freezes everything else. They start as no change at all.

    Args:
        seed: of A's random start; torch's global generator is left as it was.
    Raises:
        ConfigError: peft is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("lora.rank must be 0 where peft is not installed; pip install 'distrl[lora]'") from error
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        target_modules=list(settings.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # It finds by itself how a layer of GPT-2 stores its weight.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=NAME)
    except ValueError as error:
        raise ConfigError(
            f"lora.targets must name linear layers of {type(model).__name__}, got {list(settings.targets)}: "
            f"{str(error).splitlines()[0]}"
        ) from error


@dataclass(frozen=True, slots=True)
class AdapterLayer:
    """A linear layer with an adapter: its weight W counts as W + scale B A."""

    a_shape: tuple[int, ...]
    """[rank, inputs]"""
    b_shape: tuple[int, ...]
    """[outputs, rank]"""
    scale: float
    """alpha / rank"""
    transposed: bool
    """Whether W is kept as [inputs, outputs], as GPT-2 does."""

    def added(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """A new tensor of the weight's type: the weight with the adapter added."""
        change = self.scale * (b @ a)
        return weight + (change.T if self.transposed else change).to(weight.dtype)


def adapter_layers(model: Any) -> dict[str, AdapterLayer]:
    """The layers of a model that `add_adapters` gave adapters, by the names that they had without them."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            a, b = layer.lora_A[NAME].weight.shape, layer.lora_B[NAME].weight.shape
            found[path] = AdapterLayer(tuple(a), tuple(b), layer.scaling[NAME], bool(layer.fan_in_fan_out))
    return found


def adapter_names(path: str) -> tuple[str, str]:
    """What A and B of a layer are called where they are published."""
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def adapters(tensors: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Those of a model's tensors that belong to adapters, under the names of `adapter_names`.

    Args:
        tensors, gather: as for `merged`.
    """
    for name, tensor in tensors.items():
        if _is_adapter(name):
            yield name.replace(f".{NAME}.weight", ".weight"), gather(tensor)


def merged(
    tensors: Mapping[str, Tensor], model: Any, gather: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model with its adapters added to the layers that they belong to, named as without them.

    Args:
        tensors: of the model, see `distrl.weights.policy_tensors`.
        gather: makes a whole tensor of one that may be sharded; called in the same order in every worker.
    """
    layers = adapter_layers(model) if any(map(_is_adapter, tensors)) else {}
    for name, tensor in tensors.items():
        path, base, rest = name.partition(".base_layer.")
        if _is_adapter(name):
            continue
        if not base or path not in layers:
            yield name, gather(tensor)
            continue
        whole = gather(tensor)
        if rest == "weight":
            a, b = (gather(tensors[f"{path}.lora_{side}.{NAME}.weight"]) for side in "AB")
            whole = layers[path].added(whole, a, b)
        yield f"{path}.{rest}", whole


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
