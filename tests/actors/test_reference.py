"""Reference scoring: every ticket alone, its rows in order, and nothing that is no log-probability."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from actors.reference import Reference, Score
from distrl.errors import SchemaError
from tests.builders import generation_batch, run

BATCHES = [generation_batch(0, (2, 3)), generation_batch(1, (1,))]


def negative_ids(rollouts: pa.RecordBatch) -> Sequence[np.ndarray]:
    """A "model" whose log-probability of a token is minus its id."""
    return [-np.asarray(row, np.float32) for row in rollouts.column("response_token_ids").to_pylist()]


def refused(score: Score) -> str:
    with pytest.raises(SchemaError) as caught:
        run(Reference(score).score(*BATCHES))
    return str(caught.value)


def test_each_rollout_gets_its_own_numbers_with_the_version_that_gave_them() -> None:
    times = iter([10.0, 12.5])
    receipt, batch = run(Reference(negative_ids, version=6, clock=lambda: next(times)).score(*BATCHES))

    expected = [
        {
            "rollout_id": row["rollout_id"],
            "ref_logps": [-float(token) for token in row["response_token_ids"]],
            "ref_version": 6,
            "reference_started_s": 10.0,
            "reference_finished_s": 12.5,
        }
        for generation in BATCHES
        for row in generation.to_pylist()
    ]
    assert batch.to_pylist() == expected
    assert (receipt.tokens, receipt.bytes) == (2 + 3 + 1, batch.nbytes)
    assert (receipt.started_s, receipt.finished_s) == (10.0, 12.5)


def test_tickets_are_scored_one_by_one() -> None:
    seen: list[int] = []

    def score(rollouts: pa.RecordBatch) -> Sequence[np.ndarray]:
        seen.append(rollouts.num_rows)
        return negative_ids(rollouts)

    run(Reference(score).score(*BATCHES))
    assert seen == [2, 1]


def test_a_number_that_is_no_log_probability_is_refused_with_its_rollout() -> None:
    def positive(rollouts: pa.RecordBatch) -> Sequence[np.ndarray]:
        return [np.abs(row) for row in negative_ids(rollouts)]

    def nan(rollouts: pa.RecordBatch) -> Sequence[np.ndarray]:
        return [row * np.float32("nan") for row in negative_ids(rollouts)]

    assert refused(positive) == "reference batch: rollout p0.0.0: ref_logps must be <= 0, got 10.0"
    assert refused(nan) == "reference batch: rollout p0.0.0: ref_logps must be finite, got nan"


def test_a_model_that_forgets_a_rollout_is_refused() -> None:
    message = refused(lambda rollouts: negative_ids(rollouts)[:1])
    assert message.startswith("reference batch: Arrays were not all the same length: ")


def test_a_model_that_fails_gives_its_error() -> None:
    def broken(rollouts: pa.RecordBatch) -> Sequence[np.ndarray]:
        raise MemoryError("out of memory")

    with pytest.raises(MemoryError, match=r"^out of memory$"):
        run(Reference(broken).score(*BATCHES))
