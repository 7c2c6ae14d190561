"""AdamW as the recipes use it, against its formula in plain float64 arithmetic."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from distrl.errors import ConfigError
from learners.optimizer import OptimizerSettings, check_schedule, clip_gradient, learning_rate, make_optimizer
from tests.builders import refusal

SETTINGS = OptimizerSettings(learning_rate=0.1, warmup_steps=4, weight_decay=0.3, betas=(0.8, 0.9), max_grad_norm=1.0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
        self.gain = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
        self.frozen = nn.Parameter(torch.tensor([[5.0]], dtype=torch.float64), requires_grad=False)


def adamw(value: float, gradients: list[float], decay: float) -> float:
    """Loshchilov & Hutter 2019, algorithm 2, with bias correction and eps 1e-8."""
    (beta1, beta2), m, v = SETTINGS.betas, 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        value -= SETTINGS.learning_rate * decay * value
        value -= SETTINGS.learning_rate * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + 1e-8)
    return value


def test_steps_follow_adamw_and_only_matrices_decay() -> None:
    model = Model()
    optimizer = make_optimizer(model, SETTINGS)
    gradients = [0.5, -0.25, 2.0]
    for g in gradients:
        model.matrix.grad = torch.tensor([[g, 2 * g]], dtype=torch.float64)
        model.gain.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()

    doubled = [2 * g for g in gradients]
    assert model.matrix[0, 0].item() == pytest.approx(adamw(1.0, gradients, 0.3), abs=1e-12)
    assert model.matrix[0, 1].item() == pytest.approx(adamw(-2.0, doubled, 0.3), abs=1e-12)
    assert model.gain.item() == pytest.approx(adamw(3.0, gradients, 0.0), abs=1e-12)
    assert model.frozen.item() == 5.0


def test_frozen_parameters_are_not_in_the_optimizer() -> None:
    model = Model()
    held = {id(p) for group in make_optimizer(model, SETTINGS).param_groups for p in group["params"]}
    assert held == {id(model.matrix), id(model.gain)}


def test_a_model_of_one_kind_of_parameter_is_fine() -> None:
    assert len(make_optimizer(nn.Linear(2, 2, bias=False), SETTINGS).param_groups) == 1


def test_the_learning_rate_rises_linearly_and_stays() -> None:
    rates = [learning_rate(SETTINGS, step) for step in range(1, 7)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_without_a_warm_up_the_first_step_has_the_whole_rate() -> None:
    settings = OptimizerSettings(0.1, 0, 0.0, (0.9, 0.95), 1.0)
    assert learning_rate(settings, 1) == 0.1


def test_the_gradient_is_clipped_as_one_vector_and_its_norm_before_is_returned() -> None:
    model = Model()
    model.matrix.grad = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    model.gain.grad = torch.tensor([4.0], dtype=torch.float64)
    assert clip_gradient(model, 1.0) == pytest.approx(5.0)
    assert [*model.matrix.grad[0].tolist(), model.gain.grad.item()] == pytest.approx([0.6, 0.0, 0.8], abs=1e-6)


def test_a_small_gradient_is_left_alone() -> None:
    model = Model()
    model.matrix.grad = torch.tensor([[0.03, 0.04]], dtype=torch.float64)
    assert clip_gradient(model, 1.0) == pytest.approx(0.05)
    assert model.matrix.grad.tolist() == [[0.03, 0.04]]


def test_a_norm_that_is_not_finite_is_returned() -> None:
    model = Model()
    model.gain.grad = torch.tensor([float("nan")], dtype=torch.float64)
    assert math.isnan(clip_gradient(model, 1.0))


def schedule(name: str, warmup: int = 0, steps: int = 9, **options: float) -> list[float]:
    """Rates of all steps, as parts of the full one."""
    settings = replace(SETTINGS, schedule=name, warmup_steps=warmup, steps=steps, schedule_options=options)
    check_schedule(settings)
    return [learning_rate(settings, step) / SETTINGS.learning_rate for step in range(1, steps + 1)]


def test_schedules_are_those_of_their_usual_names() -> None:
    assert schedule("constant") == [1.0] * 9
    assert schedule("constant_with_warmup", 4) == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 6)
    # Down to 0 after the last step, so that the last one still learns.
    assert schedule("linear") == pytest.approx([(10 - step) / 10 for step in range(1, 10)])
    assert schedule("cosine") == pytest.approx([(1 + math.cos(math.pi * step / 10)) / 2 for step in range(1, 10)])
    floor = schedule("cosine_with_min_lr", min_lr_rate=0.5)
    assert floor == pytest.approx([0.5 + 0.5 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(1, 10)])
    assert schedule("inverse_sqrt", 4)[-1] == pytest.approx(1 / math.sqrt((9 + 0) / 4))


def test_options_that_a_schedule_does_not_know_are_refused() -> None:
    message = refusal(ConfigError, lambda: schedule("cosine", speed=2.0))
    assert message.startswith(
        "train.lr_schedule_options must be the options of train.lr_schedule cosine, got {'speed': 2.0}: "
    )
    assert message.endswith("; see transformers.get_scheduler")
    assert refusal(ConfigError, lambda: schedule("constant", 3)) == (
        "train.lr_warmup_steps must be 0 for train.lr_schedule constant, got 3; use constant_with_warmup"
    )
