"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) by peft: W + alpha / rank B A, of which B and A are trained."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distrl.errors import ConfigError

NAME = "default"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """See `distrl.config.LoraConfig`."""

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


def adapter_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a model's tensors that belong to adapters."""
    return {name: x for name, x in tensors.items() if ".lora_A." in name or ".lora_B." in name}


def merged(
    tensors: Mapping[str, Tensor], model: Any, gather: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model with its adapters added to the layers that they belong to, named as without them.

    Args:
        tensors: of the model, see `distrl.weights.policy_tensors`.
        gather: makes a whole tensor of one that may be sharded; called in the same order in every worker.
    """
    layers: dict[str, Any] = {}
    if adapter_tensors(tensors):
        from peft.tuners.lora import LoraLayer

        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, tensor in tensors.items():
        path, base, rest = name.partition(".base_layer.")
        if ".lora_A." in name or ".lora_B." in name:
            continue
        if not base or path not in layers:
            yield name, gather(tensor)
            continue
        whole = gather(tensor)
        if rest == "weight":
            layer = layers[path]
            a, b = (gather(tensors[f"{path}.lora_{side}.{NAME}.weight"]) for side in "AB")
            change = layer.scaling[NAME] * (b @ a)
            whole = whole + (change.T if layer.fan_in_fan_out else change).to(whole.dtype)
        yield f"{path}.{rest}", whole
