"""AdamW, and learning-rate schedules under the names that transformers gives them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import nn

from distrl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """See `distrl.config_sections.TrainConfig`."""

    learning_rate: float
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float]
    max_grad_norm: float
    schedule: str = "constant_with_warmup"
    """Of `transformers.get_scheduler`."""
    schedule_options: Mapping[str, float | str] = field(default_factory=dict)
    steps: int = 1
    """Optimizer steps of the run."""


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only, not on gains and biases."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate, betas=settings.betas)


def learning_rate(settings: OptimizerSettings, step: int) -> float:
    """Of optimizer step number `step`, the first is 1.

    Steps count from 1 to the run's last and the schedule ends after it, so that neither the first step of a warm-up nor
    the last one of a decay is made with a rate of 0.
    """
    factor = _factor(
        settings.schedule,
        settings.learning_rate,
        settings.warmup_steps,
        settings.steps,
        tuple(sorted(settings.schedule_options.items())),
    )
    return settings.learning_rate * factor(step)


def check_schedule(settings: OptimizerSettings) -> None:
    """
    Raises:
        ConfigError: the schedule lacks an option, does not know one or cannot be computed with them.
    """
    if settings.schedule == "constant" and settings.warmup_steps:
        raise ConfigError(
            f"train.lr_warmup_steps must be 0 for train.lr_schedule constant, got {settings.warmup_steps}; use "
            "constant_with_warmup"
        )
    try:
        for step in (1, settings.steps):
            learning_rate(settings, step)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"train.lr_schedule_options must be the options of train.lr_schedule {settings.schedule}, got "
            f"{dict(settings.schedule_options)}: {error}; see transformers.get_scheduler"
        ) from error


@cache
def _factor(
    name: str, rate: float, warmup: int, steps: int, options: tuple[tuple[str, float | str], ...]
) -> Callable[[int], float]:
    if name in ("constant", "constant_with_warmup") and not options:
        return lambda step: min(1.0, step / warmup) if warmup else 1.0

    # Importing it takes over a second of the command's start, which most runs' schedules can do without.
    from transformers import get_scheduler

    nothing = torch.optim.SGD([torch.zeros(1)], lr=rate)
    schedule = get_scheduler(
        name,
        nothing,
        num_warmup_steps=warmup,
        num_training_steps=steps + 1,
        scheduler_specific_kwargs=dict(options) or None,
    )
    factor = schedule.lr_lambdas[0]
    return lambda step: float(factor(step))


def clip_gradient(model: nn.Module, max_norm: float) -> float:
    """Clips the global gradient norm in place; returns the norm before. Raises nothing on a non-finite norm."""
    from torch.distributed.tensor import DTensor

    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
