"""Blocked log-probabilities, entropy and divergences against the plain way over whole logits, in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distrl import vocabulary
from distrl.objectives import divergences
from distrl.objectives.batch import Batch
from distrl.objectives.losses import FullDivergence
from distrl.vocabulary import Head, full_divergence, token_logps, top_symbols

N, H, V = 23, 6, 41
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.3},
    "capped": {"softcap": 2.0, "scale": 1.5, "bias": True},
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks each way, the last ones smaller than the others."""
    monkeypatch.setattr(vocabulary, "CPU_BLOCK", (7, 9))


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, width: int = H) -> tuple[Tensor, Head]:
    options = dict(HEADS[kind])
    bias = leaf(V, seed=seed + 1, dtype=dtype).requires_grad_() if options.pop("bias", False) else None
    weight = leaf(V, width, seed=seed + 2, dtype=dtype).requires_grad_()
    return leaf(N, width, seed=seed + 3, dtype=dtype).requires_grad_(), Head(weight, bias, **options)  # type: ignore[arg-type]


def gradients(loss: Tensor, hidden: Tensor, head: Head) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [t for t in (hidden, head.weight, head.bias) if t is not None]))


def agree(found: list[Tensor], expected: list[Tensor], atol: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
        assert b.abs().max() > 1e-3  # no comparison of zeros


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_and_their_gradients_are_those_of_log_softmax(kind: str, temperature: float) -> None:
    hidden, head = make(kind)
    symbols = torch.randint(V, (N, 3), generator=torch.Generator().manual_seed(5))
    upstream = leaf(N, 3, seed=6)
    table = torch.log_softmax(head.logits(hidden) / temperature, 1)
    expected = table.gather(1, symbols)
    found, entropy = token_logps(hidden, head, symbols, temperature)

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    agree(gradients((found * upstream).sum(), hidden, head), gradients((expected * upstream).sum(), hidden, head))
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(1).detach(), rtol=0, atol=1e-10)
    assert not entropy.requires_grad


def test_the_gradient_passes_gradcheck() -> None:
    hidden, head = make("capped")
    symbols = torch.randint(V, (N, 2), generator=torch.Generator().manual_seed(5))

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return token_logps(hidden, replace(head, weight=weight, bias=bias), symbols, 0.7).logps

    assert torch.autograd.gradcheck(logps, (hidden, head.weight, head.bias), atol=1e-6)


def test_logits_far_from_zero_overflow_nowhere() -> None:
    hidden, head = make("plain", dtype=torch.float32)
    far = Head(head.weight.detach() * 300)
    symbols = torch.arange(N)[:, None]
    found, entropy = token_logps(hidden, far, symbols)
    exact = torch.log_softmax(far.logits(hidden).double(), 1)
    torch.testing.assert_close(found.double(), exact.gather(1, symbols), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(1), rtol=0, atol=1e-3)


def test_in_bfloat16_only_the_products_are_rounded() -> None:
    hidden, head = make("plain", dtype=torch.bfloat16)
    symbols = torch.arange(N)[:, None]
    found, _ = token_logps(hidden, head, symbols)
    exact = torch.log_softmax(head.logits(hidden.double()), 1).gather(1, symbols)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.05)
    ours = gradients(found.sum(), hidden, head)
    plain = gradients(exact.sum(), hidden, head)
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0.1 * b.abs().max().item())


@pytest.mark.parametrize("k", [1, 5, V])
def test_top_symbols_are_those_of_the_whole_logits(k: int) -> None:
    hidden, head = make("capped")
    assert torch.equal(top_symbols(hidden, head, k), head.logits(hidden).topk(k).indices)


ROWS = {
    "reverse": divergences.ReverseKL(),
    "normalized": divergences.ReverseKL(normalized=True),
    "forward": divergences.ForwardKL(),
    "js": divergences.JensenShannon(),
    "hellinger": divergences.Hellinger(),
    "chi2": divergences.ChiSquared(),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("bound", [20.0, 1.0])
def test_a_full_divergence_is_that_of_the_loss_over_whole_logits(row: str, bound: float) -> None:
    """With a bound of 1 nat the floor under the reference acts on many symbols."""
    hidden, head = make("capped")
    ref_hidden, ref_head = make("bias", seed=9, width=4)
    upstream = leaf(N, seed=6)
    rows = {"logits": head.logits(hidden)[None] / 0.8, "ref_logits": ref_head.logits(ref_hidden)[None] / 0.8}
    batch = Batch(torch.ones(1, N, dtype=torch.bool), logps=torch.zeros(1, N, dtype=torch.float64), columns=rows)
    loss = FullDivergence(ROWS[row], max_log_ratio=bound)
    expected = loss(batch, torch.zeros(1, N), torch.ones(1, N))[0]
    found = full_divergence(hidden, head, ref_hidden, ref_head, ROWS[row], temperature=0.8, max_log_ratio=bound)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    agree(
        gradients((found * upstream).sum(), hidden, head),
        gradients((expected * upstream).sum(), hidden, head),
        atol=1e-10 * max(1.0, expected.detach().abs().max().item()),
    )


def test_a_top_k_divergence_needs_the_log_probabilities_of_k_symbols_only() -> None:
    """With its tail: what `FullDivergence` with top_k computes from whole logits."""
    hidden, head = make("plain")
    ref_hidden, ref_head = make("bias", seed=9)
    k = 4
    rows = {"logits": head.logits(hidden)[None], "ref_logits": ref_head.logits(ref_hidden)[None]}
    batch = Batch(torch.ones(1, N, dtype=torch.bool), logps=torch.zeros(1, N, dtype=torch.float64), columns=rows)
    expected = FullDivergence(divergences.ReverseKL(), top_k=k)(batch, torch.zeros(1, N), torch.ones(1, N))[0]

    symbols = top_symbols(hidden, head, k)
    log_q = vocabulary.with_tail(token_logps(hidden, head, symbols).logps)
    log_p = vocabulary.with_tail(token_logps(ref_hidden, ref_head, symbols).logps).detach()
    found = divergences.ReverseKL().pointwise(log_q, log_p).sum(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    agree(gradients(found.sum(), hidden, head), gradients(expected.sum(), hidden, head))


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, head = make("bias")
    frozen = Head(head.weight.detach(), None if head.bias is None else head.bias.detach())
    token_logps(hidden, frozen, torch.zeros(N, 1, dtype=torch.int64)).logps.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().max() > 0
    assert frozen.weight.grad is None
