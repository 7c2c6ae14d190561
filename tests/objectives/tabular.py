"""Softmax policies small enough to enumerate every response, in float64."""

import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from distrl.objectives import Batch, LossOutput, Recipe, evaluate, prepare

torch.set_num_threads(1)

WIDTH = 5
LEARNABLE = {1: [2], 2: [1, 3]}
"""Where the tokens of a response stand: between a prompt, a tool's token and padding, that nobody learns."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parameters(symbols: int, steps: int, seed: int) -> Tensor:
    """Logits of every state: the empty prefix, and with two steps each first symbol."""
    return random(1 if steps == 1 else 1 + symbols, symbols, seed=seed).requires_grad_()


def token_logps(logits: Tensor, steps: int) -> Tensor:
    """[responses, steps] log-probability of each token of every response."""
    logps = logits.log_softmax(1)
    symbols = logits.shape[1]
    if steps == 1:
        return logps[0][:, None]
    first, second = torch.cartesian_prod(torch.arange(symbols), torch.arange(symbols)).unbind(1)
    return torch.stack([logps[0][first], logps[1 + first, second]], 1)


def sequence_logps(logits: Tensor, steps: int) -> Tensor:
    """[responses] log-probability of every response."""
    return token_logps(logits, steps).sum(1)


def spread(values: Tensor, garbage: float = math.nan) -> Tensor:
    """[n, steps] values at the learnable positions of [n, WIDTH], garbage at the others."""
    placed = torch.full((len(values), WIDTH), garbage, dtype=values.dtype)
    for step, position in enumerate(LEARNABLE[values.shape[1]]):
        placed = torch.cat([placed[:, :position], values[:, step : step + 1], placed[:, position + 1 :]], 1)
    return placed


def responses(logits: Tensor, steps: int, *, rows: Tensor | None = None, **models: Tensor) -> dict[str, Tensor]:
    """The tensors of every response, or of those with the numbers `rows`, under the policy and other models.

    Args:
        models: logits by the name of the model's tensor, such as ref_logps.
    """
    tensors = {"logps": token_logps(logits, steps)}
    tensors |= {name: token_logps(other, steps).detach() for name, other in models.items()}
    if rows is not None:
        tensors = {name: x[rows] for name, x in tensors.items()}
    mask = torch.zeros(len(tensors["logps"]), WIDTH, dtype=torch.bool)
    mask[:, LEARNABLE[steps]] = True
    return {name: spread(x) for name, x in tensors.items()} | {"mask": mask}


def all_groups(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Every group of `size` responses drawn from `count`: response numbers, and group numbers, of each row."""
    groups = torch.tensor(list(itertools.product(range(count), repeat=size)))
    return groups.flatten(), torch.arange(len(groups)).repeat_interleave(size)


def group_probability(log_sampler: Tensor, rows: Tensor, size: int) -> Tensor:
    """How often each row of `all_groups` occurs, so that the sum over rows is the mean over a group's rows."""
    together = log_sampler.detach()[rows].reshape(-1, size).sum(1).exp()
    return together.repeat_interleave(size) / size


def expected(
    recipe: Recipe, tensors: dict[str, Tensor], probability: Tensor, credit: Tensor | None = None
) -> LossOutput:
    """The recipe's loss in expectation: each of B enumerated rows (or N pairs) counts with its probability
    instead of 1 / B.

    Args:
        credit: [B, T] a credit that does not depend on the policy, in place of the recipe's own.
    """
    batch = Batch.from_tensors(tensors, recipe=recipe.name)
    plan = prepare(recipe, batch)
    if credit is not None:
        plan = replace(plan, credit=torch.where(batch.mask, credit, 0.0))
    times = probability.detach() * len(probability)
    shares = tuple(share * (times if share.ndim == 1 else times[:, None]) for share in plan.shares)
    return evaluate(recipe, batch, replace(plan, shares=shares))


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def sequence_kl(logits: Tensor, reference: Tensor, steps: int) -> Tensor:
    """KL(pi || reference) of whole responses, with the gradient of pi."""
    log_pi = sequence_logps(logits, steps)
    return (log_pi.exp() * (log_pi - sequence_logps(reference, steps).detach())).sum()


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
