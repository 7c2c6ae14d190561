"""How several workers share a model: copies whose gradients are averaged (DDP), or shards of it (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from distrl.errors import ConfigError
from distrl.policy_model import PolicyModel
from learners.world import World

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True, slots=True)
class ParallelSettings:
    """See `distrl.config_sections.TrainConfig`."""

    parallel: Parallel = "ddp"
    dtype: torch.dtype = torch.float32
    """Of products; parameters and sums of gradients are kept in float32 whatever it is."""
    activation_checkpointing: bool = False


def prepare_model(model: Any, settings: ParallelSettings) -> None:
    """Puts a Hugging Face model into the state in which it is trained: without dropout, maybe with less memory.

    With dropout the learner's log-probabilities would not be those of the policy that it publishes.
    """
    model.eval()
    if settings.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"train.activation_checkpointing must be false for the model class {type(model).__name__}, which "
                "has no blocks that can be computed again, got true"
            )
        model.activation_checkpointing_enable()
        # transformers computes blocks again in training mode only.
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0


def parallelize(policy: PolicyModel, world: World, settings: ParallelSettings) -> nn.Module:
    """The module to call for a forward pass whose gradients are those of all workers.

    Raises:
        ConfigError: the model cannot be sharded; it says which module.
    """
    if settings.parallel == "fsdp":
        return _shard(policy, world, settings.dtype)
    if world.size == 1:
        return policy
    return DistributedDataParallel(
        policy,
        device_ids=None if world.device.type == "cpu" else [world.device],
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


@contextmanager
def accumulating(module: nn.Module, last: bool) -> Iterator[None]:
    """Around a forward and backward pass: copies exchange their gradients in the last one of a step only.

    Shards exchange them in each, which is what lets no worker hold all of them.
    """
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield


def shardable_blocks(model: Any) -> list[nn.Module]:
    """The repeated blocks of a model, the units that are gathered and freed again.

    Raises:
        ConfigError: the class names none that it has, or two share a parameter.
    """
    name = type(model).__name__
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [m for m in model.modules() if type(m).__name__ in kinds]
    if not blocks:
        raise ConfigError(
            f"train.parallel: model class {name} must name the blocks that can be sharded (_no_split_modules), got "
            f"{sorted(kinds) or 'none'}, of which it has none; use ddp"
        )
    owner: dict[int, str] = {}
    names = {id(module): path for path, module in model.named_modules()}
    for block in blocks:
        for parameter in block.parameters():
            other = owner.setdefault(id(parameter), names[id(block)])
            if other != names[id(block)]:
                raise ConfigError(
                    f"train.parallel: the blocks of model class {name} must have parameters of their own to be "
                    f"sharded, got one that {other} and {names[id(block)]} share; use ddp"
                )
    inside = {id(inner) for block in blocks for inner in block.modules() if inner is not block}
    return [block for block in blocks if id(block) not in inside]


def _shard(policy: PolicyModel, world: World, dtype: torch.dtype) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(world.device.type, (world.size,))
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=None if dtype == torch.float32 else torch.float32,
    )
    for block in shardable_blocks(policy.model):
        try:
            fully_shard(block, mesh=mesh, mp_policy=precision)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ConfigError(
                f"train.parallel: {type(block).__name__} of model class {type(policy.model).__name__} cannot be "
                f"sharded: {error}; use ddp"
            ) from error
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    assert isinstance(policy, FSDPModule)
    return policy
