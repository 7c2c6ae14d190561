"""Log-probabilities of responses under a causal language model: padding, forward pass, gathering.

Shapes: B rollouts, P prompt tokens (left-padded), T response tokens (right-padded), V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distrl.schema import list_values


@dataclass(frozen=True, slots=True)
class PaddedTokens:
    """Rollouts as rectangular tensors."""

    input_ids: Tensor
    """[B, P + T] int64: prompts end, and responses begin, at column P."""
    prompt_lengths: Tensor
    """[B] int64."""
    response_mask: Tensor
    """[B, T] bool: True where a response token is."""

    def rows(self, index: Tensor) -> "PaddedTokens":
        """Some of the rollouts, cut to the longest prompt and response among them."""
        lengths, mask = self.prompt_lengths[index], self.response_mask[index]
        prompt_width = self.input_ids.shape[1] - self.response_mask.shape[1]
        longest_prompt, longest_response = int(lengths.max()), int(mask.sum(1).max())
        columns = slice(prompt_width - longest_prompt, prompt_width + longest_response)
        return PaddedTokens(self.input_ids[index][:, columns], lengths, mask[:, :longest_response])


def pad_rollouts(rollouts: pa.RecordBatch, pad_token_id: int) -> PaddedTokens:
    """Pads the prompts and responses of a batch that has the generation columns."""
    prompts, prompt_offsets = list_values(rollouts.column("prompt_token_ids"))
    responses, response_offsets = list_values(rollouts.column("response_token_ids"))
    prompt_lengths, response_lengths = np.diff(prompt_offsets), np.diff(response_offsets)
    P, T = int(prompt_lengths.max()), int(response_lengths.max())
    ids = np.full((rollouts.num_rows, P + T), pad_token_id, dtype=np.int64)
    columns = np.arange(P + T)
    # Rows are filled in order, so the flat values of all rows land where the mask is true.
    ids[(columns >= P - prompt_lengths[:, None]) & (columns < P)] = prompts
    response_mask = columns[:T] < response_lengths[:, None]
    ids[:, P:][response_mask] = responses
    return PaddedTokens(
        torch.from_numpy(ids),
        torch.from_numpy(prompt_lengths.astype(np.int64)),
        torch.from_numpy(response_mask),
    )


def pad_lists(column: pa.Array, response_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A per-token list column as [B, T], 0 where the mask is False."""
    values, _ = list_values(column)
    padded = torch.zeros(response_mask.shape, dtype=dtype)
    padded[response_mask] = torch.from_numpy(values.copy()).to(dtype)
    return padded


def response_logps(model: Callable[..., Any], tokens: PaddedTokens, temperature: float) -> Tensor:
    """log softmax(logits / temperature) of each response token.

    Args:
        model: a Hugging Face causal language model.
        temperature: the one the responses were sampled with, > 0.
    Returns:
        [B, T] float32 in nats, differentiable; 0 where there is no response token.
    """
    logits = _response_logits(model, tokens, temperature)
    return _chosen(logits, torch.logsumexp(logits, dim=2), tokens)


def logps_and_entropy(model: Callable[..., Any], tokens: PaddedTokens, temperature: float) -> tuple[Tensor, Tensor]:
    """`response_logps`, and the entropy of the distribution that each response token was drawn from.

    Returns:
        Log-probabilities as `response_logps`, and -sum_v p_v log p_v [B, T] in nats, detached; 0 where there is no
        response token.
    """
    logits = _response_logits(model, tokens, temperature)
    normalizer = torch.logsumexp(logits, dim=2)
    with torch.no_grad():
        entropy = normalizer - (torch.softmax(logits, dim=2) * logits).sum(2)
        entropy = torch.where(tokens.response_mask, entropy, torch.zeros_like(entropy))
    return _chosen(logits, normalizer, tokens), entropy


def _response_logits(model: Callable[..., Any], tokens: PaddedTokens, temperature: float) -> Tensor:
    """[B, T, V] float32 logits over the temperature, at the positions that give the response tokens."""
    T = tokens.response_mask.shape[1]
    P = tokens.input_ids.shape[1] - T
    padding = P - tokens.prompt_lengths
    columns = torch.arange(P + T, device=tokens.input_ids.device)
    # Right padding needs no mask: a causal model never looks at it from a response token.
    attention_mask = None if not bool(padding.any()) else (columns >= padding[:, None]).long()
    output = model(
        input_ids=tokens.input_ids,
        attention_mask=attention_mask,
        position_ids=(columns - padding[:, None]).clamp(min=0),
        use_cache=False,
        logits_to_keep=T + 1,
    )
    logits: Tensor = output.logits[:, :-1].float() / temperature
    return logits


def _chosen(logits: Tensor, normalizer: Tensor, tokens: PaddedTokens) -> Tensor:
    P = tokens.input_ids.shape[1] - tokens.response_mask.shape[1]
    logps = logits.gather(2, tokens.input_ids[:, P:, None])[..., 0] - normalizer
    return torch.where(tokens.response_mask, logps.clamp(max=0.0), torch.zeros_like(logps))


def split_rows(padded: Tensor, mask: Tensor) -> Sequence[np.ndarray]:
    """The entries of a [B, T] tensor under the mask, one array per row."""
    values = padded.detach().cpu().numpy()
    lengths = mask.sum(1).tolist()
    return [row[:length] for row, length in zip(values, lengths, strict=True)]
