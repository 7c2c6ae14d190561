"""Log-probabilities, entropy and divergences over a vocabulary without the [tokens, vocabulary] tensor.

Logits are made in blocks of tokens and symbols that fit into a processor's cache, used, and made again in the backward
pass: memory grows with neither the tokens nor the vocabulary, for a third more multiplications. On a CPU the blocks are
faster than the plain way at small widths all the same, because nothing passes through main memory.

Liger's fused linear cross-entropy (arXiv:2410.10989) does the first of these for CUDA, with Triton; it has no entropy,
no temperature and no CPU. What is here runs wherever torch does.

Shapes: N tokens, H width of the model, V vocabulary, K symbols per token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distrl.objectives.divergences import Row

CPU_BLOCK = (1024, 1024)
"""Tokens and symbols of a block on a CPU: 4 MiB of logits, which stay in its cache."""

OTHER_BLOCK = (4096, 16384)
"""On other devices, which want large products."""


@dataclass(frozen=True, slots=True)
class Head:
    """How a model makes logits of its last hidden state: cap(scale (h W^T + b)), cap(x) = softcap tanh(x / softcap)."""

    weight: Tensor
    """[V, H]."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, symbols: slice = slice(None)) -> Tensor:
        """[N, V] or those of some symbols, differentiable; in float32, or float64 where the hidden states are."""
        raw = hidden @ self.weight[symbols].to(hidden.dtype).T
        if self.bias is not None:
            raw = raw + self.bias[symbols].to(raw.dtype)
        raw = _precise(raw) * self.scale
        return raw if self.softcap is None else torch.tanh(raw / self.softcap) * self.softcap


class TokenLogps(NamedTuple):
    """What `token_logps` gives."""

    logps: Tensor
    """[N, K] log-probabilities of the chosen symbols, nats, differentiable."""
    entropy: Tensor
    """[N] -sum_v p_v log p_v, nats, constant."""


def token_logps(hidden: Tensor, head: Head, symbols: Tensor, temperature: float = 1.0) -> TokenLogps:
    """log softmax(logits / temperature) at some symbols of each token, and the entropy of its distribution.

    Args:
        hidden: [N, H] with gradient.
        head: its weight and bias with gradient.
        symbols: [N, K] int64.
        temperature: > 0.
    Returns:
        In float32, or float64 where `hidden` is.
    """
    scaling = _Scaling(head.scale, head.softcap, temperature)
    logps, entropy = _TokenLogps.apply(hidden, head.weight, head.bias, symbols, scaling)  # type: ignore[no-untyped-call]
    return TokenLogps(logps, entropy)


def top_symbols(hidden: Tensor, head: Head, k: int) -> Tensor:
    """[N, k] the likeliest symbols of each token, the likeliest first; no gradient."""
    best: Tensor | None = None
    with torch.no_grad():
        found = []
        scaling = _Scaling(head.scale, head.softcap, 1.0)
        for rows in _tokens(hidden):
            best = index = None
            for symbols, x in _logit_blocks(hidden[rows], head.weight, head.bias, scaling):
                values, at = x.topk(min(k, x.shape[1]))
                at = at + symbols.start
                if best is not None and index is not None:
                    values, at = torch.cat([best, values], 1), torch.cat([index, at], 1)
                best, order = values.topk(min(k, values.shape[1]))
                index = at.gather(1, order)
            found.append(index)
    return torch.cat([x for x in found if x is not None])


def full_divergence(
    hidden: Tensor,
    head: Head,
    ref_hidden: Tensor,
    ref_head: Head,
    row: Row,
    *,
    temperature: float = 1.0,
    max_log_ratio: float = 20.0,
) -> Tensor:
    """D_f(pi(. | s_t) || ref(. | s_t)) of each token over the whole vocabulary.

    The same numbers as `distrl.objectives.losses.FullDivergence` from logits: a floor under the reference bounds
    log pi / ref by `max_log_ratio`, and where it acts the divergence is cut off.

    Args:
        hidden, head: of the policy, with gradient.
        ref_hidden, ref_head: of the reference, [N, H'] and a vocabulary of the same size; constants.
    Returns:
        [N] in float32, or float64 where `hidden` is.
    """
    ours = _Scaling(head.scale, head.softcap, temperature)
    theirs = _Scaling(ref_head.scale, ref_head.softcap, temperature)
    reference = (ref_hidden.detach(), ref_head.weight.detach(), _detached(ref_head.bias), theirs)
    made: Tensor = _FullDivergence.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, ours, reference, row, max_log_ratio
    )
    return made


class _Scaling(NamedTuple):
    """x = cap(scale z) / temperature of a raw logit z."""

    scale: float
    softcap: float | None
    temperature: float

    @property
    def before(self) -> float:
        """What a raw logit is multiplied with first; folded into the hidden states, so that it costs nothing."""
        return self.scale / (self.temperature if self.softcap is None else self.softcap)

    def finish_(self, z: Tensor) -> Tensor:
        return z if self.softcap is None else z.tanh_().mul_(self.softcap / self.temperature)

    def through_(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient in `before` z, of that in x."""
        if self.softcap is None:
            return gradient
        share = self.softcap / self.temperature
        return gradient.mul_((x / share).square_().neg_().add_(1.0).mul_(share))


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, symbols: Tensor, scaling: _Scaling
    ) -> tuple[Tensor, Tensor]:
        normalizer, mean = _normalizer_and_mean(hidden, weight, bias, scaling)
        chosen = torch.empty(symbols.shape, dtype=normalizer.dtype, device=hidden.device)
        for k in range(symbols.shape[1]):
            at = symbols[:, k]
            raw = (_precise(hidden) * _precise(weight[at])).sum(1)
            if bias is not None:
                raw += _precise(bias[at])
            chosen[:, k] = scaling.finish_(raw.mul_(scaling.before))
        ctx.save_for_backward(hidden, weight, bias, symbols, normalizer, chosen)
        ctx.scaling = scaling
        entropy = normalizer - mean
        ctx.mark_non_differentiable(entropy)
        # A probability beyond 1 is rounding.
        return (chosen - normalizer[:, None]).clamp_(max=0.0), entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, symbols, normalizer, chosen = ctx.saved_tensors
        gradient, scaling = gradients[0], ctx.scaling
        sums = _Sums(hidden, weight, bias, scaling, ctx.needs_input_grad)
        total = gradient.sum(1)
        for rows in _tokens(hidden):
            for at, x in _logit_blocks(hidden[rows], weight, bias, scaling):
                kept = None if scaling.softcap is None else x.clone()
                slope = x.sub_(normalizer[rows, None]).exp_().mul_(-total[rows, None])
                sums.add(rows, at, slope if kept is None else scaling.through_(slope, kept))
        for k in range(symbols.shape[1]):
            sums.add_chosen(symbols[:, k], scaling.through_(gradient[:, k].clone(), chosen[:, k]))
        return *sums.result(), None, None


class _FullDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scaling: _Scaling,
        reference: tuple[Tensor, Tensor, Tensor | None, _Scaling],
        row: Row,
        max_log_ratio: float,
    ) -> Tensor:
        normalizer, _ = _normalizer_and_mean(hidden, weight, bias, scaling)
        ref_normalizer, _ = _normalizer_and_mean(*reference)
        ctx.policy = _Distribution(hidden, weight, bias, scaling, normalizer)
        ctx.reference = _Distribution(*reference, ref_normalizer)
        ctx.row, ctx.max_log_ratio = row, max_log_ratio
        divergence, slope = torch.zeros_like(normalizer), torch.zeros_like(normalizer)
        for rows in _tokens(hidden):
            for _, log_q, log_p in _pairs(ctx.policy, ctx.reference, rows, max_log_ratio):
                # Far below the reference the divergence is flat, too.
                bounded = torch.maximum(log_q, log_p - 2 * max_log_ratio)
                divergence[rows] += row.pointwise(bounded, log_p).sum(1)
                slope[rows] += _slope(row, log_q, log_p, max_log_ratio).sum(1)
        ctx.slope = slope
        return divergence

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        policy: _Distribution = ctx.policy
        sums = _Sums(policy.hidden, policy.weight, policy.bias, policy.scaling, ctx.needs_input_grad)
        for rows in _tokens(policy.hidden):
            for at, log_q, log_p in _pairs(policy, ctx.reference, rows, ctx.max_log_ratio):
                # log q_v = x_v - log sum_w exp x_w:  dD/dx_v = d_v - q_v sum_w d_w,  d = dD/dlog q.
                step = _slope(ctx.row, log_q, log_p, ctx.max_log_ratio) - log_q.exp() * ctx.slope[rows, None]
                step *= gradients[0][rows, None]
                sums.add(rows, at, policy.scaling.through_(step, log_q + policy.normalizer[rows, None]))
        return *sums.result(), None, None, None, None


class _Distribution(NamedTuple):
    """Next-token distributions of N tokens, as what they are made of."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scaling: _Scaling
    normalizer: Tensor


def _pairs(
    policy: _Distribution, reference: _Distribution, rows: slice, max_log_ratio: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of log q and log p, bounded like those of `FullDivergence`."""
    q = _logit_blocks(policy.hidden[rows], policy.weight, policy.bias, policy.scaling)
    p = _logit_blocks(reference.hidden[rows], reference.weight, reference.bias, reference.scaling)
    for (at, log_q), (_, log_p) in zip(q, p, strict=True):
        log_q.sub_(policy.normalizer[rows, None]).clamp_(min=-1e4)
        log_p.sub_(reference.normalizer[rows, None]).clamp_(min=-1e4)
        torch.maximum(log_p, log_q - max_log_ratio, out=log_p)
        yield at, log_q, log_p


def _slope(row: Row, log_q: Tensor, log_p: Tensor, max_log_ratio: float) -> Tensor:
    """d pointwise / d log q = q f'(q / p), with the ratio's lower bound, beyond which a divergence is flat."""
    log_u = log_q - log_p
    bounded = torch.maximum(log_q, log_p - 2 * max_log_ratio)
    slope = bounded.exp() * row.slope(bounded - log_p)
    return torch.where(log_u < -2 * max_log_ratio, torch.zeros_like(slope), slope)


class _Sums:
    """The gradients of hidden states, weight and bias, added up over blocks in float32 or more.

    Args:
        wanted: which of the three are asked for; a frozen weight's gradient is neither computed nor held.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: _Scaling, wanted: Sequence[bool]
    ) -> None:
        self._hidden, self._weight, self._before = hidden, weight, scaling.before
        self._given = (hidden, weight, bias)
        self._sums = [
            torch.zeros_like(x, dtype=_dtype(hidden)) if x is not None and asked else None
            for x, asked in zip(self._given, wanted, strict=False)
        ]

    def add(self, rows: slice, symbols: slice, gradient: Tensor) -> None:
        """Of a block of logits; `gradient` is used up."""
        of_hidden, of_weight, of_bias = self._sums
        gradient *= self._before
        if of_bias is not None:
            of_bias[symbols] += gradient.sum(0)
        hidden = self._hidden[rows]
        gradient = gradient.to(hidden.dtype)
        if of_hidden is not None:
            _add_product(of_hidden[rows], gradient, self._weight[symbols].to(hidden.dtype))
        if of_weight is not None:
            _add_product(of_weight[symbols], gradient.T, hidden)

    def add_chosen(self, symbols: Tensor, gradient: Tensor) -> None:
        """Of the logit of one symbol per token."""
        of_hidden, of_weight, of_bias = self._sums
        step = (gradient * self._before)[:, None]
        if of_bias is not None:
            of_bias.index_add_(0, symbols, step[:, 0])
        for rows in _tokens(self._hidden):
            if of_hidden is not None:
                of_hidden[rows].addcmul_(step[rows], self._weight[symbols[rows]].to(step.dtype))
            if of_weight is not None:
                of_weight.index_add_(0, symbols[rows], step[rows] * self._hidden[rows])

    def result(self) -> tuple[Tensor | None, ...]:
        pairs = zip(self._sums, self._given, strict=True)
        return tuple(None if x is None or given is None else x.to(given.dtype) for x, given in pairs)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, whatever the precision of the sum."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _normalizer_and_mean(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: _Scaling
) -> tuple[Tensor, Tensor]:
    """log sum_v exp x_v and sum_v p_v x_v of each token, [N] each, in one pass over the blocks."""
    dtype, tokens = _dtype(hidden), len(hidden)
    highest = torch.full((tokens,), -torch.inf, dtype=dtype, device=hidden.device)
    mass, weighted = torch.zeros_like(highest), torch.zeros_like(highest)
    for rows in _tokens(hidden):
        m, s, u = highest[rows], mass[rows], weighted[rows]
        for _, x in _logit_blocks(hidden[rows], weight, bias, scaling):
            higher = torch.maximum(m, x.amax(1))
            shrink = (m - higher).exp_()
            # u = sum exp(x - m) (x - m) moves with m, too; of nothing yet it is 0.
            moved = torch.where(s > 0, u + s * (m - higher), torch.zeros_like(u))
            x.sub_(higher[:, None])
            e = x.exp()
            u.copy_(moved * shrink + torch.linalg.vecdot(e, x.clamp_(min=-1e4)))
            s.mul_(shrink).add_(e.sum(1))
            m.copy_(higher)
    return highest + mass.log(), highest + weighted / mass


def _logit_blocks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: _Scaling
) -> Iterator[tuple[slice, Tensor]]:
    """Symbols and [n, v] final logits of each block of the vocabulary, new tensors that may be written to."""
    scaled = hidden * scaling.before
    width = _block(hidden)[1]
    for begin in range(0, len(weight), width):
        at = slice(begin, min(begin + width, len(weight)))
        z = _precise(scaled @ weight[at].to(hidden.dtype).T)
        if bias is not None:
            z += _precise(bias[at]) * scaling.before
        yield at, scaling.finish_(z)


def _tokens(hidden: Tensor) -> Iterator[slice]:
    height = _block(hidden)[0]
    return (slice(begin, min(begin + height, len(hidden))) for begin in range(0, len(hidden), height))


def _block(hidden: Tensor) -> tuple[int, int]:
    return CPU_BLOCK if hidden.device.type == "cpu" else OTHER_BLOCK


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(_dtype(tensor))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def with_tail(logps: Tensor) -> Tensor:
    """Log-probabilities of K symbols and of everything else together, [N, K + 1]; see `divergences.fold`."""
    # The mass of the K symbols may round to 1; the smallest tail keeps logarithm and gradient finite.
    rest = -torch.expm1(torch.logsumexp(logps, -1, keepdim=True).clamp(max=-torch.finfo(logps.dtype).eps))
    return torch.cat([logps, rest.log()], -1)
