"""The tensors of a batch, and anchors: linear combinations of log-probabilities.

Shape suffixes: B = responses, T = positions. Log-probabilities are natural logs (nats).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

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
    "anchor": "anchor_logps",
}
"""The name of the tensor that holds each model's log-probabilities; any other model is in `<name>_logps`."""

SHAPES: Mapping[str, tuple[str, ...]] = {
    "group": ("B",),
    "v_star": ("B",),
    "preference": ("B",),
    "values": ("B, T",),
    "policy_versions": ("B, T",),
    "logits": ("B, T, V",),
    "ref_logits": ("B, T, V",),
    "pairs": ("N, 2",),
    "pair_preference": ("N",),
}
"""Shapes of the tensors that have one of their own: log-probabilities are [B, T], other columns [B] or [B, T]."""

LIVE = ("values", "logits")
"""Columns that carry gradient, beside the policy's log-probabilities."""


def tensor_name(model: str) -> str:
    """The name of the tensor that holds a model's log-probabilities."""
    return MODEL_TENSORS.get(model, f"{model}_logps")


@dataclass(frozen=True, slots=True)
class Batch:
    """B responses in any order, T positions. No result depends on the order or on the padding."""

    mask: Tensor
    """[B, T] bool, True where the policy chose the token. Whatever stands elsewhere, NaN included, is not
    read."""
    group: Tensor | None = None
    """[B] int: responses with one number were drawn for one ticket. Read only where they are compared."""
    logps: Tensor | None = None
    """[B, T] log pi(y_t | s_t), with gradient. `prepare` does without it, unless a reward, a return or a
    self-normalized term reads it."""
    models: Mapping[str, Tensor] = field(default_factory=dict)
    """[B, T] log-probabilities of the same tokens under behavior, proximal, reference, anchor; constants."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Everything else by name, see `SHAPES`: rewards; constants, apart from values and logits."""
    step: int = 0
    """Optimizer steps done before this one; what schedules count."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the step before, for schedules that control something."""

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, recipe: str, step: int = 0) -> "Batch":
        """The batch of tensors that carry the names of the record schema.

        Args:
            tensors: mask [B, T]; logps, ref_logps and any other `<model>_logps` [B, T]; rewards [B] or
                [B, T]; the tensors of `SHAPES`. Any other name is a column.
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
        known = {name: model for model, name in MODEL_TENSORS.items()}
        models = {
            known.get(name, name.removesuffix("_logps")): x for name, x in tensors.items() if name.endswith("_logps")
        }
        columns = {
            name: x
            for name, x in tensors.items()
            if name not in ("mask", "group", "logps") and not name.endswith("_logps")
        }
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
        tensors = {tensor_name(model): x for model, x in self.models.items()} | dict(self.columns)
        tensors |= {name: x for name, x in (("logps", self.logps), ("group", self.group)) if x is not None}
        B, T = self.mask.shape
        sizes = {"B": B, "T": T}
        if "pairs" in tensors:
            sizes["N"] = len(tensors["pairs"])
        for name, tensor in tensors.items():
            patterns = SHAPES.get(name, ("B, T",) if name.endswith("logps") else ("B", "B, T"))
            if not any(_fits(tensor, pattern, sizes) for pattern in patterns):
                wanted = " or ".join(f"[{_filled(pattern, sizes)}]" for pattern in patterns)
                raise SchemaError(
                    f"{recipe} needs the tensor {name} of shape {wanted}, got {_kind(tensor)}; "
                    f"the mask has shape {[B, T]}, and every tensor has its rows in the same order"
                )
        pairs = tensors.get("pairs")
        if pairs is not None and (pairs.is_floating_point() or bool(((pairs < 0) | (pairs >= B)).any())):
            raise SchemaError(
                f"{recipe} needs the tensor pairs as row numbers from 0 to {B - 1}, got {_kind(pairs)} with others; "
                "pass the rows of the two responses of each pair"
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
            present = {"logps" if x == "policy" else tensor_name(x) if x in self.models else x for x in there}
            raise SchemaError(
                f"{recipe} needs the tensor {_wanted(name)}, got {_names({*present, 'mask'})}; "
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

    def column(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A column [B, T] or [B, T, V], 0 where the mask is False whatever stood there.

        Args:
            dtype: that of the result; None is the precision of the losses.
        """
        column = self.columns[name]
        mask = self.mask if column.ndim == 2 else self.mask[..., None]
        return torch.where(mask, column, 0.0).to(self.dtype if dtype is None else dtype)

    def pool(self, values_B: Tensor, how: Literal["mean", "sum", "amin", "amax"]) -> Tensor:
        """[B] sum, mean or extreme over the rows of each row's group; the mean of equal values is exactly that
        value.

        Raises:
            SchemaError: the batch has no group numbers.
        """
        if self.group is None:
            raise SchemaError("the batch has no tensor group ([B] int), which a group mean reads; pass ticket numbers")
        if how == "mean":
            # The mean of equal numbers may differ from them in the last bit, which a deviation of 0 would turn
            # into credits of +-1.
            lowest = self.pool(values_B, "amin")
            return lowest + self.pool(values_B - lowest, "sum") / self.pool(torch.ones_like(values_B), "sum")
        _, number = torch.unique(self.group, return_inverse=True)
        start = torch.zeros(int(number.max()) + 1, dtype=values_B.dtype, device=values_B.device)
        return start.scatter_reduce(0, number, values_B, how, include_self=False).gather(0, number)

    def rows(self, index: Tensor, logps: Tensor | None = None, fresh: Mapping[str, Tensor] | None = None) -> "Batch":
        """The responses at `index`, with fresh outputs of the policy.

        Args:
            index: [b] row numbers.
            logps: [b, W] fresh log pi, with gradient; None keeps the stored ones. W may be less than T when
                no learnable token lies beyond W (a micro-batch is padded to its own longest response).
            fresh: values [b, W] and logits [b, W, V], with gradient, where the recipe reads them.

        Returns:
            A batch of b responses and W positions, its tensors on the device of `logps`. Pairs of responses
            are those among the rows, in the batch's order.

        Raises:
            SchemaError: a learnable token lies beyond W, or a pair has one of its responses outside.
        """
        width = self.mask.shape[1] if logps is None else logps.shape[1]
        device = self.mask.device if logps is None else logps.device
        check_width(self.mask[index], width)

        def take(tensor: Tensor) -> Tensor:
            part = tensor[index.to(tensor.device)]
            return (part[:, :width] if part.ndim > 1 else part).to(device)

        columns = {name: x for name, x in self.columns.items() if name not in ("pairs", "pair_preference")}
        columns = {name: take(x) for name, x in columns.items()} | dict(fresh or {})
        if "pairs" in self.columns:
            chosen, pairs = pairs_among(self.columns["pairs"], index.to(self.columns["pairs"].device))
            columns["pairs"] = pairs.to(device)
            if "pair_preference" in self.columns:
                columns["pair_preference"] = self.columns["pair_preference"][chosen].to(device)
        stored = None if self.logps is None else take(self.logps)
        return replace(
            self,
            mask=take(self.mask),
            group=None if self.group is None else take(self.group),
            logps=stored if logps is None else logps,
            models={name: take(tensor) for name, tensor in self.models.items()},
            columns=columns,
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


def pairs_among(pairs_N2: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs lie among the rows at `index`, [N] bool, and those pairs [n, 2] numbered like the rows.

    Raises:
        SchemaError: only one response of a pair is among the rows.
    """
    inside = torch.isin(pairs_N2, index)
    if bool((inside[:, 0] != inside[:, 1]).any()):
        split = pairs_N2[inside[:, 0] != inside[:, 1]][0].tolist()
        raise SchemaError(
            f"rows would part the pair {split}, of which one response is outside; "
            "put both responses of a pair into one micro-batch (whole groups do)"
        )
    chosen = inside.all(1)
    position = torch.full((int(torch.cat([pairs_N2.flatten(), index]).max()) + 1,), -1, device=index.device)
    position[index] = torch.arange(len(index), device=index.device)
    return chosen, position[pairs_N2[chosen]]


def _fits(tensor: Tensor, pattern: str, sizes: Mapping[str, int]) -> bool:
    wanted = pattern.split(", ")
    return tensor.ndim == len(wanted) and all(
        have == (int(name) if name.isdigit() else sizes.get(name, have))
        for have, name in zip(tensor.shape, wanted, strict=True)
    )


def _filled(pattern: str, sizes: Mapping[str, int]) -> str:
    return ", ".join(str(sizes.get(name, name)) for name in pattern.split(", "))


def _wanted(name: str) -> str:
    """A missing model or column with the name and the shape of its tensor."""
    if name == "policy":
        return "logps ([B, T])"
    if name in MODEL_TENSORS:
        return f"{MODEL_TENSORS[name]} ([B, T])"
    if name in SHAPES:
        return f"{name} ([{SHAPES[name][0]}]{' int' if name in ('group', 'pairs', 'policy_versions') else ''})"
    if name.startswith("rewards"):
        return f"{name} ([B] or [B, T])"
    return f"{name}_logps ([B, T]) or the column {name}"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _names(tensors: Iterable[str]) -> str:
    return ", ".join(sorted(tensors)) or "no tensor"
