"""Quantiles of importance ratios from counts in fixed bins, which micro-batches and ranks can add.

Exact quantiles need all ratios in one place; counts need 65 numbers whatever the batch. A bin of log-ratios is a
third wide as it is far from 0 (beyond 0.001 nats), so that a quantile q of the ratio is met within q^0.3, and where the
ratios are near 1 within a thousandth.
"""

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

_POSITIVE = tuple(1e-3 * 1.3335**i for i in range(32))  # up to 7.5 nats
EDGES = (*(-e for e in reversed(_POSITIVE)), *_POSITIVE)
"""Inner edges of the bins of log(policy / behavior), in nats."""
QUANTILES = {"ratio_p01": 0.01, "ratio_p50": 0.5, "ratio_p99": 0.99}

_PREFIX = "ratio_bin_"


def bin_counts(log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How many tokens of the mask fall into each bin.

    Args:
        log_ratio: [B, T], nats; constant.
        mask: [B, T], True where a token counts.
    """
    edges = torch.tensor(EDGES, dtype=log_ratio.dtype, device=log_ratio.device)
    bins = torch.bucketize(log_ratio[mask].contiguous(), edges)
    counts = torch.bincount(bins, minlength=len(EDGES) + 1)
    return {f"{_PREFIX}{i}": count for i, count in enumerate(counts)}


def ratio_quantiles(sums: Mapping[str, float]) -> dict[str, float]:
    """Quantiles of policy / behavior per token, linear in the log-ratio inside a bin; empty without counts.

    Args:
        sums: the counts of `bin_counts`, added up over parts.
    """
    counts = [sums.get(f"{_PREFIX}{i}", 0.0) for i in range(len(EDGES) + 1)]
    total = sum(counts)
    if not total:
        return {}
    # The outer bins have no outer edge; what lies there is shown at the inner one.
    lower, upper = (EDGES[0], *EDGES), (*EDGES, EDGES[-1])
    reached = [0.0, *accumulate(counts)]
    found = {}
    for name, share in QUANTILES.items():
        wanted = share * total
        i = next(i for i, count in enumerate(counts) if count and reached[i + 1] >= wanted)
        inside = (wanted - reached[i]) / counts[i]
        found[name] = float(torch.tensor(lower[i] + inside * (upper[i] - lower[i]), dtype=torch.float64).exp())
    return found
