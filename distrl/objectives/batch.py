"""The tensors of a batch, and anchors: linear combinations of log-probabilities.

Shape suffixes: B = responses, T = positions. Log-probabilities are natural logs (nats).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distrl.errors import SchemaError

Anchor = Mapping[str, float]
"""{"reference": 1/6, "ema": 5/6} is sum_k c_k log p_k, not normalized; "policy" is the policy being
trained."""

MODEL_TENSORS: Mapping[str, str] = {
    "behavior": "behavior_logps",
    "proximal": "proximal_logps",
    "reference": "ref_logps",
}
"""The name of the tensor that holds each model's log-probabilities."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B responses in any order, T positions. No result depends on the order or on the padding."""

    mask: Tensor
    """[B, T] bool, True where the policy chose the token. Whatever stands elsewhere, NaN included, is not
    read."""
    group: Tensor | None = None
    """[B] int: responses with one number were drawn for one ticket. Read only where they are compared."""
    logps: Tensor | None = None
    """[B, T] log pi(y_t | s_t), the only tensor that carries gradient. `prepare` does without it, unless a
    term is self-normalized."""
    models: Mapping[str, Tensor] = field(default_factory=dict)
    """[B, T] log-probabilities of the same tokens under behavior, proximal, reference; constants."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Everything else by name, [B] or [B, T]: rewards; constants."""
    step: int = 0
    """Optimizer steps done before this one; what schedules count."""

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, recipe: str, step: int = 0) -> "Batch":
        """The batch of tensors that carry the names of the record schema.

        Args:
            tensors: mask [B, T]; logps, behavior_logps, proximal_logps, ref_logps [B, T]; rewards [B] or
                [B, T]; group [B]. Any other name is a column.
            recipe: name of the recipe, for messages.
            step: optimizer steps done before this one.

        Raises:
            SchemaError: mask is missing, or a tensor has the wrong shape or dtype.
        """
        if "mask" not in tensors:
            raise SchemaError(
                f"{recipe} needs the tensor mask ([B, T] bool, True where the policy chose the token), "
                f"got {_names(tensors)}; pass loss_mask of the rollouts as mask"
            )
        mask = tensors["mask"]
        models = {model: tensors[name] for model, name in MODEL_TENSORS.items() if name in tensors}
        apart = {"mask", "group", "logps", *MODEL_TENSORS.values()}
        columns = {name: tensor for name, tensor in tensors.items() if name not in apart}
        batch = cls(mask, tensors.get("group"), tensors.get("logps"), models, columns, step)
        batch.check(recipe)
        return batch

    def check(self, recipe: str) -> None:
        """Refuse a tensor that does not fit the mask.

        Raises:
            SchemaError: naming the recipe, the tensor, the shape it should have and the one that it has.
        """
        if self.mask.ndim != 2 or self.mask.dtype != torch.bool or 0 in self.mask.shape:
            raise SchemaError(
                f"{recipe} needs the tensor mask as bool of shape [B, T] with B, T >= 1, "
                f"got {_kind(self.mask)}; convert it with mask.bool()"
            )
        B, T = self.mask.shape
        whole, row = [[B, T]], [[B]]
        expected: dict[str, tuple[Tensor, list[list[int]]]] = {}
        if self.group is not None:
            expected["group"] = (self.group, row)
        if self.logps is not None:
            expected["logps"] = (self.logps, whole)
        expected |= {MODEL_TENSORS.get(name, name): (x, whole) for name, x in self.models.items()}
        expected |= {name: (x, row + whole) for name, x in self.columns.items()}
        for name, (tensor, shapes) in expected.items():
            if list(tensor.shape) not in shapes:
                wanted = " or ".join(str(shape) for shape in shapes)
                raise SchemaError(
                    f"{recipe} needs the tensor {name} of shape {wanted}, got {_kind(tensor)}; "
                    f"the mask has shape {[B, T]}, and every tensor has its rows in the same order"
                )

    def require(self, recipe: str, names: frozenset[str]) -> None:
        """Refuse a batch that lacks a model or column.

        Args:
            names: "policy", model names such as "reference", column names such as "rewards".

        Raises:
            SchemaError: naming the recipe, the first missing tensor and the ones that are there.
        """
        there = {*self.models, *self.columns}
        there |= {name for name, x in (("policy", self.logps), ("group", self.group)) if x is not None}
        for name in sorted(names - there):
            tensor = "logps" if name == "policy" else MODEL_TENSORS.get(name, name)
            shape = "[B] int" if name == "group" else "[B, T]" if tensor != name else "[B] or [B, T]"
            present = {"logps" if x == "policy" else MODEL_TENSORS.get(x, x): None for x in there}
            raise SchemaError(
                f"{recipe} needs the tensor {tensor} ({shape}), got {_names({**present, 'mask': None})}; "
                f"required_columns(recipe) lists what a recipe reads"
            )

    def log(self, anchor: Anchor) -> Tensor:
        """Log-probability of each token under a mixture, sum_k c_k log p_k.

        Args:
            anchor: coefficient of each model; only "policy" carries gradient.

        Returns:
            [B, T] in float32, or float64 where the policy is; exactly 0 with zero gradient where the mask is
            False, even if NaN stands there.
        """
        total: Tensor | None = None
        for name, coefficient in anchor.items():
            logps = self._policy() if name == "policy" else self.models[name].detach()
            # Mask the input and not the result: NaN * 0 is NaN in the backward pass.
            part = coefficient * torch.where(self.mask, logps, 0.0).to(self.dtype)
            total = part if total is None else total + part
        if total is None:
            raise ValueError("an anchor needs at least one model, got {}; name one, such as {'reference': 1.0}")
        return total

    @property
    def dtype(self) -> torch.dtype:
        """The precision of losses: float64 for a float64 policy, float32 for every other."""
        return torch.float64 if self.logps is not None and self.logps.dtype == torch.float64 else torch.float32

    def rows(self, index: Tensor, logps: Tensor | None = None) -> "Batch":
        """The responses at `index`, with fresh log-probabilities of the policy.

        Args:
            index: [b] row numbers.
            logps: [b, W] fresh log pi, with gradient; None keeps the stored ones. W may be less than T when
                no learnable token lies beyond W (a micro-batch is padded to its own longest response).

        Returns:
            A batch of b responses and W positions, its tensors on the device of `logps`.

        Raises:
            SchemaError: a learnable token lies beyond W.
        """
        width = self.mask.shape[1] if logps is None else logps.shape[1]
        device = self.mask.device if logps is None else logps.device
        check_width(self.mask[index], width)

        def take(tensor: Tensor) -> Tensor:
            part = tensor[index.to(tensor.device)]
            return (part[:, :width] if part.ndim > 1 else part).to(device)

        stored = None if self.logps is None else take(self.logps)
        return replace(
            self,
            mask=take(self.mask),
            group=None if self.group is None else take(self.group),
            logps=stored if logps is None else logps,
            models={name: take(tensor) for name, tensor in self.models.items()},
            columns={name: take(tensor) for name, tensor in self.columns.items()},
        )

    def at_proximal(self) -> "Batch":
        """The same batch under the proximal policy: the current one, detached, where none is recorded."""
        proximal = self.models.get("proximal", self.logps)
        return replace(self, logps=None if proximal is None else proximal.detach())

    def _policy(self) -> Tensor:
        if self.logps is None:
            raise SchemaError(
                "the batch has no tensor logps, which a weight, a gate or a loss reads; "
                "pass the policy's log-probabilities, or proximal_logps for prepare"
            )
        return self.logps


def check_width(mask_BT: Tensor, width: int) -> None:
    """Refuse to cut off learnable tokens.

    Raises:
        SchemaError: a position >= width is True.
    """
    if width < mask_BT.shape[1] and bool(mask_BT[:, width:].any()):
        last = int(mask_BT.any(0).nonzero().max())
        raise SchemaError(
            f"rows cut to {width} positions would lose a learnable token at position {last}; "
            f"pad the micro-batch to at least {last + 1} positions"
        )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _names(tensors: Mapping[str, object]) -> str:
    return ", ".join(sorted(tensors)) or "no tensor"
