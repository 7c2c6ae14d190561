"""Softmax policies small enough to enumerate every response, in float64."""

from dataclasses import replace

import torch
from torch import Tensor

from distrl.objectives import Batch, LossOutput, Recipe, evaluate, prepare

torch.set_num_threads(1)


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


def expected(recipe: Recipe, tensors: dict[str, Tensor], probability: Tensor) -> LossOutput:
    """The recipe's loss in expectation: each of B enumerated rows counts with its probability instead of 1 /
    B."""
    batch = Batch.from_tensors(tensors, recipe=recipe.name)
    plan = prepare(recipe, batch)
    times = (probability.detach() * len(probability))[:, None]
    return evaluate(recipe, batch, replace(plan, shares=tuple(share * times for share in plan.shares)))


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
