"""Rollouts as rectangular tensors, and per-token columns beside them.

Shapes: B rollouts, P prompt tokens (left-padded), T response tokens (right-padded), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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

    @property
    def lengths(self) -> Tensor:
        """[B] prompt plus response."""
        return self.prompt_lengths + self.response_mask.sum(1)

    def to(self, device: torch.device) -> "PaddedTokens":
        return PaddedTokens(self.input_ids.to(device), self.prompt_lengths.to(device), self.response_mask.to(device))

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


def split_rows(padded: Tensor, mask: Tensor) -> Sequence[np.ndarray]:
    """The entries of a [B, T] tensor under the mask, one array per row."""
    values = padded.detach().cpu().numpy()
    lengths = mask.sum(1).tolist()
    return [row[:length] for row, length in zip(values, lengths, strict=True)]
