"""From the columns of a batch to the tensors of the objective, and its split into micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distrl.logps import PaddedTokens, pad_lists, pad_rollouts
from distrl.rollouts import join


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """One global batch: rows are rollouts, in the order of tickets and group indices."""

    tokens: PaddedTokens
    tensors: dict[str, Tensor]
    """By the names of the objective: mask, behavior_logps, ref_logps [B, T]; rewards, group [B]."""
    response_tokens: int
    versions: Tensor
    """[B, T] int64: policy version that each response token names; 0 where there is none."""
    engines: list[str]
    """[B] names of the actors that sampled."""


def training_batch(
    tickets: Sequence[tuple[pa.RecordBatch, pa.RecordBatch, pa.RecordBatch | None]], pad_token_id: int
) -> TrainingBatch:
    """Joins the stages' columns of several tickets and pads them.

    Args:
        tickets: (generation, grading, reference or None) of each.
    """
    joined = [join(*stages) for stages in tickets]
    rollouts = pa.Table.from_batches(joined).combine_chunks().to_batches()[0]
    tokens = pad_rollouts(rollouts, pad_token_id)
    mask = tokens.response_mask
    tensors = {
        "mask": pad_lists(rollouts.column("loss_mask"), mask, torch.bool),
        "behavior_logps": pad_lists(rollouts.column("behavior_logps"), mask, torch.float32),
        "rewards": torch.from_numpy(rollouts.column("reward").to_numpy().copy()),
        "group": torch.from_numpy(rollouts.column("ticket_id").to_numpy().copy()),
    }
    if all(reference is not None for _, _, reference in tickets):
        tensors["ref_logps"] = pad_lists(rollouts.column("ref_logps"), mask, torch.float32)
    versions = pad_lists(rollouts.column("policy_versions"), mask, torch.int64)
    return TrainingBatch(tokens, tensors, int(mask.sum()), versions, rollouts.column("engine").to_pylist())


def micro_batches(tokens: PaddedTokens, group: Tensor, most_tokens: int) -> list[Tensor]:
    """Splits a batch into runs of whole groups with at most `most_tokens` padded tokens each.

    A single group that is larger is a micro-batch of its own. Groups of similar length are put together, so that
    little is padded; the split depends on the lengths only.

    Returns:
        Row numbers of each micro-batch, int64.
    """
    prompts, responses = tokens.prompt_lengths.numpy(), tokens.response_mask.sum(1).numpy()

    def padded(rows: list[int]) -> int:
        return len(rows) * int(prompts[rows].max() + responses[rows].max())

    groups: dict[int, list[int]] = {}
    for row, ticket in enumerate(group.tolist()):
        groups.setdefault(ticket, []).append(row)
    by_length = sorted(groups.values(), key=lambda rows: (int((prompts + responses)[rows].max()), rows[0]))
    parts: list[list[int]] = []
    for rows in by_length:
        if parts and padded(parts[-1] + rows) <= most_tokens:
            parts[-1] += rows
        else:
            parts.append(list(rows))
    return [torch.from_numpy(np.asarray(part, dtype=np.int64)) for part in parts]
