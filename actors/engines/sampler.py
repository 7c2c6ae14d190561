"""From logits to one token per row and its log-probability under the distribution it was drawn from."""

import torch
from torch import Tensor

from distrl.errors import StageError

CHUNK_ELEMENTS = 4_000_000
"""Logits handled at once.

Bounds the float64 copies to 32 MB each, where 256 rows of 150,000 logits would take 307 MB.
"""

HEAD = 1024
"""Most likely tokens that are sorted in search of top_p; all are sorted only if these do not reach it."""


def sample_tokens(
    logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, uniform_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

        p = softmax(logits / temperature), cut to the top_k most likely tokens, then to the smallest set of
            most likely tokens that holds top_p of what is left, and renormalized
        token = min{v : p_0 + ... + p_v > u}

    Tokens exactly as likely as the last one kept are kept too, so that the distribution does not depend on a
    sorting order. Computed in float64; a row's result does not depend on the other rows.

    Args:
        temperature_R: > 0.
        top_k_R: int64, 0 keeps all.
        top_p_R: float64 in (0, 1], 1 keeps all.
        uniform_R: float64 in [0, 1).
    Returns:
        Tokens (int64) and log-probabilities in nats (float64, finite and <= 0), each [R].
    Raises:
        StageError: a row's logits hold NaN or +inf, or nothing but -inf.
    """
    rows = max(1, CHUNK_ELEMENTS // logits_RV.shape[1])
    if len(logits_RV) <= rows:
        return _sample(logits_RV, temperature_R, top_k_R, top_p_R, uniform_R)
    arguments = (logits_RV, temperature_R, top_k_R, top_p_R, uniform_R)
    chunks = zip(*(torch.split(argument, rows) for argument in arguments), strict=True)
    parts = [_sample(*chunk) for chunk in chunks]
    tokens, logps = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logps)


def _sample(
    logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, uniform_R: Tensor
) -> tuple[Tensor, Tensor]:
    scaled_RV = logits_RV.double() / temperature_R[:, None]
    largest_R1 = scaled_RV.amax(-1, keepdim=True)
    usable_R1 = torch.isfinite(largest_R1)  # amax passes NaN on.
    if not bool(usable_R1.all()):
        raise StageError(
            "next-token logits must not be NaN or +inf, "
            f"got them in {int((~usable_R1).sum())} of {len(usable_R1)} rows; "
            "the policy has diverged: go back to an earlier checkpoint"
        )
    scaled_RV -= largest_R1
    weights_RV = scaled_RV.exp()
    _truncate(weights_RV, top_k_R, top_p_R)
    cumulative_RV = weights_RV.cumsum(-1)
    total_R = cumulative_RV[:, -1]
    # Strictly below the total, whatever the product is rounded to. The cumulative sum first exceeds the
    # threshold where it grows, so a token of weight 0 cannot be chosen.
    threshold_R = torch.minimum(uniform_R * total_R, torch.nextafter(total_R, torch.zeros_like(total_R)))
    tokens_R1 = torch.searchsorted(cumulative_RV, threshold_R[:, None], right=True)
    logps_R = scaled_RV.gather(1, tokens_R1)[:, 0] - total_R.log()
    # The logarithm of the sum may be rounded to just below that of its largest term.
    return tokens_R1[:, 0], logps_R.clamp(max=0.0)


def _truncate(weights_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> None:
    """Set the weights that top_k and then top_p cut off to 0, in place, in the rows that ask for it."""
    rows = top_k_R.nonzero()[:, 0]
    if len(rows):
        weights, top_k = weights_RV[rows], top_k_R[rows].clamp(max=weights_RV.shape[1])
        largest = weights.topk(int(top_k.max())).values
        smallest_kept = largest.gather(1, top_k[:, None] - 1)
        weights_RV[rows] = weights.where(weights >= smallest_kept, 0.0)
    rows = (top_p_R < 1).nonzero()[:, 0]
    if len(rows):
        weights = weights_RV[rows]
        weights_RV[rows] = weights.where(weights >= _nucleus_edge(weights, top_p_R[rows, None]), 0.0)


def _nucleus_edge(weights_RV: Tensor, top_p_R1: Tensor) -> Tensor:
    """Weight of the least likely token in the smallest set that holds top_p of each row's weight, [R, 1]."""
    V = weights_RV.shape[1]
    mass_R1 = top_p_R1 * weights_RV.sum(-1, keepdim=True)
    largest_RK = weights_RV.topk(min(HEAD, V)).values
    if largest_RK.shape[1] < V and bool((largest_RK.sum(-1, keepdim=True) < mass_R1).any()):
        largest_RK = weights_RV.sort(descending=True).values
    # A token belongs to the set when those before it do not reach top_p yet; the first always does.
    kept_R1 = 1 + (largest_RK.cumsum(-1)[:, :-1] < mass_R1).sum(-1, keepdim=True)
    return largest_RK.gather(1, kept_R1 - 1)
