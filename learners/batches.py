"""From the columns of a batch to the tensors of the objective, and its split into micro-batches."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from distrl.errors import RunError
from distrl.logps import PaddedTokens, pad_lists, pad_rollouts
from distrl.rollouts import join
from distrl.schema import Role

NO_VERSION = -1
"""In place of a policy version: no weights of this run sampled it."""


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """One global batch: rows are rollouts, in the order of tickets and group indices."""

    tokens: PaddedTokens
    tensors: dict[str, Tensor]
    """By the names of the objective: mask, behavior_logps, ref_logps [B, T]; rewards, group and,
    where the run has values, v_star [B]."""
    response_tokens: int
    versions: Tensor
    """[B, T] int64: policy version that each response token names; 0 where there is none, `NO_VERSION` in all of a
    replayed row, whose versions are those of another run."""
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
    if not rollouts.column("preference").null_count:
        preference = torch.from_numpy(rollouts.column("preference").to_numpy().copy())
        first = torch.arange(0, rollouts.num_rows - 1, 2)
        # Responses 2 i and 2 i + 1 of a ticket are the pair that was compared, where a ticket's own were.
        tensors |= {
            "preference": preference,
            "pairs": torch.stack([first, first + 1], 1),
            "pair_preference": preference[first],
        }
    if not rollouts.column("v_star").null_count:
        tensors["v_star"] = torch.from_numpy(rollouts.column("v_star").to_numpy().copy())
    versions = pad_lists(rollouts.column("policy_versions"), mask, torch.int64)
    replayed = torch.tensor([role == Role.REPLAY for role in rollouts.column("role").to_pylist()])
    versions[replayed] = NO_VERSION
    return TrainingBatch(tokens, tensors, int(mask.sum()), versions, rollouts.column("engine").to_pylist())


@dataclass(frozen=True, slots=True)
class Budget:
    """What one forward and backward pass may hold."""

    tokens: int
    """See `train.micro_batch_tokens`: rows times the longest of them where they are padded, else their sum."""
    packed: bool = False
    whole_groups: bool = False
    """Whether the responses of a ticket must stay in one pass, because the loss compares them."""


def split(lengths_B: Tensor, group_B: Tensor, budget: Budget, workers: int) -> list[list[Tensor]]:
    """Shares a global batch out among workers by tokens, and cuts each share into micro-batches within the budget.

    The longest rows are given out first, each to the worker that has the fewest tokens; rows of similar length go into
    one micro-batch, so that little is padded. The result is a function of lengths and groups alone.

    Args:
        lengths_B: tokens of each row, prompt included.
        group_B: ticket of each row.
    Returns:
        For each worker its micro-batches, as row numbers, int64. All have the same number of them, because workers meet
        in every pass; one that has nothing more to do has empty ones at the end.
    Raises:
        RunError: a row, or a ticket where tickets must stay whole, is larger than the budget.
    """
    lengths = lengths_B.tolist()
    units = _units(group_B.tolist(), budget.whole_groups)
    for unit in units:
        _check_fits(unit, lengths, group_B, budget)
    largest_first = sorted(units, key=lambda unit: (-sum(lengths[row] for row in unit), unit[0]))
    loads = [(0, worker) for worker in range(workers)]
    shares: list[list[list[int]]] = [[] for _ in range(workers)]
    for unit in largest_first:
        load, worker = heapq.heappop(loads)
        shares[worker].append(unit)
        heapq.heappush(loads, (load + sum(lengths[row] for row in unit), worker))
    cut = [_micro_batches(share, lengths, budget) for share in shares]
    most = max(len(parts) for parts in cut)
    return [
        [torch.tensor(part, dtype=torch.int64) for part in [*parts, *([[]] * (most - len(parts)))]] for parts in cut
    ]


def _units(groups: Sequence[int], whole: bool) -> list[list[int]]:
    if not whole:
        return [[row] for row in range(len(groups))]
    found: dict[int, list[int]] = {}
    for row, ticket in enumerate(groups):
        found.setdefault(ticket, []).append(row)
    return list(found.values())


def _cost(rows: Sequence[int], lengths: Sequence[int], budget: Budget) -> int:
    if budget.packed:
        return sum(lengths[row] for row in rows)
    return len(rows) * max(lengths[row] for row in rows)


def _check_fits(unit: Sequence[int], lengths: Sequence[int], group_B: Tensor, budget: Budget) -> None:
    cost = _cost(unit, lengths, budget)
    if cost > budget.tokens:
        what = f"a response of ticket {int(group_B[unit[0]])}"
        if len(unit) > 1:
            what = f"the {len(unit)} responses of ticket {int(group_B[unit[0]])}, which the objective compares,"
        raise RunError(
            f"train.micro_batch_tokens must be at least the tokens of {what} with its prompt, {cost}, got "
            f"{budget.tokens}; raise it, or lower rollout.max_new_tokens or data.max_prompt_tokens"
        )


def _micro_batches(units: Sequence[list[int]], lengths: Sequence[int], budget: Budget) -> list[list[int]]:
    by_length = sorted(units, key=lambda unit: (max(lengths[row] for row in unit), unit[0]))
    parts: list[list[int]] = []
    for unit in by_length:
        if parts and _cost(parts[-1] + unit, lengths, budget) <= budget.tokens:
            parts[-1] += unit
        else:
            parts.append(list(unit))
    return parts
