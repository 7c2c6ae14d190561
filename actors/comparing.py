"""Who is compared with whom in a ticket, and what comes of it: one preference per rollout."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import pyarrow as pa

from distrl.errors import StageError
from distrl.judges import Preference
from distrl.preferences import Comparison, Contestant
from distrl.schema import Role
from distrl.tasks.problem import Problem


@dataclass(frozen=True, slots=True)
class Compared:
    """What comparisons say of one response."""

    preference: float
    """Mean probability that it beats whom it met."""
    disagreement: float | None
    """Mean distance of the two orders in which a judge was asked; None where that is no question."""


def against_opponents(
    comparison: Comparison,
    problem: Problem,
    policy: pa.RecordBatch,
    opponents: pa.RecordBatch,
    rewards: tuple[Sequence[float], Sequence[float]] | None,
    each: int,
) -> list[Compared]:
    """How each response of a ticket does against its opponents.

    Response g meets the opponents g, g + 1, ..., g + `each` - 1, counted around: every opponent is met as often as any
    other.

    Args:
        policy, opponents: generation batches of one ticket, equally many rows.
        rewards: of both, where the comparison reads them.
    Raises:
        StageError: the judge failed, or what came as opponents are none.
    """
    roles = set(opponents.column("role").to_pylist())
    if roles != {Role.OPPONENT} or opponents.num_rows != policy.num_rows:
        raise StageError(
            f"prompt {problem.prompt_id}: {policy.num_rows} responses must meet as many of role opponent, got "
            f"{opponents.num_rows} of role {', '.join(sorted(roles)) or 'none'}"
        )
    ours = _contestants(policy, None if rewards is None else rewards[0])
    theirs = _contestants(opponents, None if rewards is None else rewards[1])
    pairs = [(one, theirs[(g + i) % len(theirs)]) for g, one in enumerate(ours) for i in range(each)]
    found = comparison.compare_all(problem, pairs)
    return [_compared(comparison, found[g * each : (g + 1) * each]) for g in range(len(ours))]


def within_pairs(
    comparison: Comparison, problem: Problem, policy: pa.RecordBatch, rewards: Sequence[float] | None
) -> list[Compared]:
    """How each response does against the other one of its pair: responses 2 i and 2 i + 1 of a ticket are one.

    Raises:
        StageError: the judge failed, or a response has nobody to be compared with.
    """
    if policy.num_rows % 2:
        raise StageError(f"prompt {problem.prompt_id}: pairs need an even number of responses, got {policy.num_rows}")
    everyone = _contestants(policy, rewards)
    found: list[Compared] = []
    for one in comparison.compare_all(problem, list(zip(everyone[::2], everyone[1::2], strict=True))):
        first = _compared(comparison, [one])
        found += [first, Compared(1.0 - first.preference, first.disagreement)]
    return found


def _compared(comparison: Comparison, found: Sequence[Preference]) -> Compared:
    disagreement = fmean(one.disagreement for one in found) if comparison.symmetrize else None
    return Compared(fmean(one.probability for one in found), disagreement)


def _contestants(batch: pa.RecordBatch, rewards: Sequence[float] | None) -> list[Contestant]:
    ids, texts = batch.column("rollout_id").to_pylist(), batch.column("text").to_pylist()
    given = [None] * len(ids) if rewards is None else list(rewards)
    return [Contestant(*row) for row in zip(ids, texts, given, strict=True)]
