"""Who is compared with whom in a ticket, and what comes of it: one preference per rollout."""

from collections.abc import Sequence
from statistics import fmean

import pyarrow as pa

from distrl.errors import StageError
from distrl.preferences import Contestant, Judge
from distrl.schema import Role
from distrl.tasks.problem import Problem


def against_opponents(
    judge: Judge,
    problem: Problem,
    policy: pa.RecordBatch,
    opponents: pa.RecordBatch,
    rewards: tuple[Sequence[float], Sequence[float]] | None,
    each: int,
) -> list[float]:
    """Mean probability that each response of a ticket beats its opponents.

    Response g meets the opponents g, g + 1, ..., g + `each` - 1, counted around: every opponent is met as often as any
    other.

    Args:
        policy, opponents: generation batches of one ticket, equally many rows.
        rewards: of both, where the judge reads rewards.
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
    return [
        fmean(judge.compare(problem, one, theirs[(g + i) % len(theirs)]) for i in range(each))
        for g, one in enumerate(ours)
    ]


def within_pairs(
    judge: Judge, problem: Problem, policy: pa.RecordBatch, rewards: Sequence[float] | None
) -> list[float]:
    """Probability that each response beats the other one of its pair: responses 2 i and 2 i + 1 of a ticket are one.

    Raises:
        StageError: the judge failed, or a response has nobody to be compared with.
    """
    if policy.num_rows % 2:
        raise StageError(f"prompt {problem.prompt_id}: pairs need an even number of responses, got {policy.num_rows}")
    everyone = _contestants(policy, rewards)
    found = []
    for first, second in zip(everyone[::2], everyone[1::2], strict=True):
        wins = judge.compare(problem, first, second)
        found += [wins, 1.0 - wins]
    return found


def _contestants(batch: pa.RecordBatch, rewards: Sequence[float] | None) -> list[Contestant]:
    ids, texts = batch.column("rollout_id").to_pylist(), batch.column("text").to_pylist()
    given = [None] * len(ids) if rewards is None else list(rewards)
    return [Contestant(*row) for row in zip(ids, texts, given, strict=True)]
