"""Optimal values of prompts, estimated from the rewards of reference responses."""

import math
from typing import Literal

import torch
from torch import Tensor

from distrl.errors import ConfigError, SchemaError

Mode = Literal["soft", "mean", "max"]


def optimal_value(rewards_BN: Tensor, *, mode: Mode = "soft", beta: float = 0.5) -> Tensor:
    """V*(x) of a KL-regularized problem from N responses of the reference.

        V = beta log mean_i exp(r_i / beta)

    Brantley et al. 2025 (arXiv:2505.20686), stage 1. By Jensen it is too low on average, never too high.
    beta to infinity is the mean reward, beta to 0 the largest; both are modes of their own, because common
    code takes beta = 0 for the mean.

    Args:
        rewards_BN: rewards of N responses to each of B prompts.
        mode: soft for the formula, mean, or max.
        beta: temperature of `soft`, in reward units, > 0; not read by the other modes.

    Returns:
        [B] float64.

    Raises:
        ConfigError: beta <= 0 with mode soft, or an unknown mode.
        SchemaError: not [B, N] with N >= 1.
    """
    if rewards_BN.ndim != 2 or rewards_BN.shape[1] == 0:
        raise SchemaError(f"rewards must have the shape [B, N] with N >= 1, got {list(rewards_BN.shape)}; stack them")
    rewards = rewards_BN.double()
    if mode == "mean":
        return rewards.mean(1)
    if mode == "max":
        return rewards.amax(1)
    if mode != "soft":
        raise ConfigError(f"optimal_value.mode must be one of soft, mean, max, got {mode!r}; soft is the paper's")
    if not 0.0 < beta < math.inf:
        raise ConfigError(
            f"optimal_value.beta must be > 0 and finite, got {beta}; "
            "its limits are modes of their own: max (0) and mean (infinity)"
        )
    return beta * (torch.logsumexp(rewards / beta, 1) - math.log(rewards.shape[1]))
