"""AdamW with a linear warm-up, as every recipe uses it."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """See `distrl.config.TrainConfig`."""

    learning_rate: float
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float]
    max_grad_norm: float


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only, not on gains and biases."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate, betas=settings.betas)


def learning_rate(settings: OptimizerSettings, step: int) -> float:
    """Of optimizer step number `step` (the first is 1): rises linearly over the warm-up, then stays."""
    if step >= settings.warmup_steps:
        return settings.learning_rate
    return settings.learning_rate * step / settings.warmup_steps


def clip_gradient(model: nn.Module, max_norm: float) -> float:
    """Clips the global gradient norm in place; returns the norm before. Raises nothing on a non-finite norm."""
    return float(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
