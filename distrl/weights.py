"""Which tensors make up a policy, and the check that a published set of them fits a model.

The learner publishes `policy_tensors` of its model and an engine loads into `policy_tensors` of its own, so both sides
agree on the names.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from distrl.errors import PolicyError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REMEDY = "publish distrl.weights.policy_tensors of the same model"


def policy_tensors(model: "torch.nn.Module") -> dict[str, "Tensor"]:
    """Parameters and persistent buffers of a model by their `state_dict` names.

    Returns:
        Detached tensors that share memory with the model: writing to one changes the model. A tensor with several names
        (tied embeddings) appears once, under the name that `state_dict` lists first.
    """
    from torch import Tensor

    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        # keep_vars: without it every entry is a new object, and tied names could not be told from equal ones.
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def check_newer(version: int, loaded: int) -> None:
    """Refuse weights older than the loaded ones: within a response, versions must not decrease.

    Raises:
        PolicyError: `version` < `loaded`. The same version may be loaded again.
    """
    if version < loaded:
        raise PolicyError(
            f"policy version {version}: must be >= the loaded version {loaded}; "
            "publish older weights under a new version"
        )


def check_policy(
    version: int,
    expected: Mapping[str, "Tensor"],
    tensors: Mapping[str, "Tensor"],
    *,
    changed_only: bool = False,
    remedy: str = REMEDY,
) -> None:
    """Refuse a set of tensors that differs from the expected one in a name or a shape; dtypes may differ.

    Args:
        changed_only: tensors may be missing; those stay as they are.
        remedy: how the messages end.
    Raises:
        PolicyError: names the first tensor that is missing, unknown or misshapen.
    """
    for name, tensor in expected.items():
        if name not in tensors:
            if changed_only:
                continue
            raise PolicyError(
                f"policy version {version}: tensor {name!r} must be given with shape {list(tensor.shape)}, "
                f"but is missing; {remedy}"
            )
        if tensors[name].shape != tensor.shape:
            raise PolicyError(
                f"policy version {version}: tensor {name!r} must have shape {list(tensor.shape)}, "
                f"got {list(tensors[name].shape)}; {remedy}"
            )
    for name, tensor in tensors.items():
        if name not in expected:
            raise PolicyError(
                f"policy version {version}: tensor {name!r} must be one of the model's {len(expected)} tensors, "
                f"got an unknown name with shape {list(tensor.shape)}; {remedy}"
            )


def copy_policy(expected: Mapping[str, "Tensor"], tensors: Mapping[str, "Tensor"]) -> None:
    """Write `tensors` into the memory of `expected` (see `policy_tensors`), converting dtype and device."""
    import torch

    with torch.no_grad():
        for name, tensor in tensors.items():
            expected[name].copy_(tensor)
