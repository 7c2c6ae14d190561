"""Joining the stages' columns, against a join of plain Python dictionaries."""

from itertools import permutations
from typing import Any

import pyarrow as pa
import pytest

from distrl.errors import SchemaError
from distrl.rollouts import join
from distrl.schema import SCHEMAS, Stage, validate
from tests.builders import generation_batch, grading_batch, reference_batch, refusal


def dict_join(generation: pa.RecordBatch, *stages: pa.RecordBatch) -> list[dict[str, Any]]:
    by_id = [{row["rollout_id"]: row for row in stage.to_pylist()} for stage in stages]
    rows = []
    for row in generation.to_pylist():
        for stage in by_id:
            row = row | stage[row["rollout_id"]]
        rows.append(row)
    return rows


def address(column: pa.Array) -> int:
    """Where the values lie in memory, the slice's offset apart."""
    return int(column.buffers()[1].address)


@pytest.fixture(name="tickets")
def three_tickets() -> list[pa.RecordBatch]:
    return [generation_batch(0, (2, 3)), generation_batch(1, (1, 4, 2)), generation_batch(2, (5,))]


def test_a_call_for_one_ticket_joins_row_by_row(tickets: list[pa.RecordBatch]) -> None:
    generation = tickets[1]
    grading, reference = grading_batch(generation), reference_batch(generation)

    joined = join(generation, grading, reference)

    assert joined.schema.equals(SCHEMAS[Stage.JOURNAL], check_metadata=True)
    assert joined.to_pylist() == dict_join(generation, grading, reference)
    validate(Stage.JOURNAL, joined)


def test_a_call_for_several_tickets_gives_each_its_own_rows(tickets: list[pa.RecordBatch]) -> None:
    grading, reference = grading_batch(*tickets), reference_batch(*reversed(tickets))

    for generation in tickets:
        assert join(generation, grading, reference).to_pylist() == dict_join(generation, grading, reference)


def test_rows_in_any_order_are_matched_by_their_id(tickets: list[pa.RecordBatch]) -> None:
    generation = tickets[1]
    grading, reference = grading_batch(*tickets), reference_batch(*tickets)
    expected = dict_join(generation, grading, reference)

    for order in permutations(range(2, 5)):  # the rows of ticket 1
        rows = pa.array([5, *order, 0, 1])
        assert join(generation, grading.take(rows), reference.take(rows)).to_pylist() == expected


def test_rows_that_stand_in_a_run_are_not_copied(tickets: list[pa.RecordBatch]) -> None:
    grading, reference = grading_batch(*tickets), reference_batch(*tickets)
    joined = join(tickets[1], grading, reference)

    assert address(joined.column("reward")) == address(grading.column("reward"))
    assert joined.column("ref_logps").values.buffers()[1].address == (
        reference.column("ref_logps").values.buffers()[1].address
    )
    assert joined.column("ticket_id").buffers()[1].address == tickets[1].column("ticket_id").buffers()[1].address


def test_slices_join_like_whole_batches(tickets: list[pa.RecordBatch]) -> None:
    grading, reference = grading_batch(*tickets), reference_batch(*tickets)
    part = tickets[1].slice(1, 2)

    joined = join(part, grading.slice(2, 3), reference.slice(1, 4))

    assert joined.to_pylist() == dict_join(part, grading, reference)


def test_without_a_reference_its_columns_are_null(tickets: list[pa.RecordBatch]) -> None:
    joined = join(tickets[0], grading_batch(tickets[0]), None)

    for name in SCHEMAS[Stage.REFERENCE].names[1:]:
        assert joined.column(name).to_pylist() == [None, None], name
    assert joined.schema.equals(SCHEMAS[Stage.JOURNAL])
    validate(Stage.JOURNAL, joined)


def test_a_missing_rollout_is_named_with_its_stage(tickets: list[pa.RecordBatch]) -> None:
    generation = tickets[1]
    grading, reference = grading_batch(*tickets), reference_batch(*tickets)

    assert refusal(SchemaError, lambda: join(generation, grading.slice(0, 4), reference)) == (
        "grading batch: every generated rollout must be there; rollout p1.0.2 is not among 4 rows"
    )
    assert refusal(SchemaError, lambda: join(generation, grading, reference.slice(3))) == (
        "reference batch: every generated rollout must be there; rollout p1.0.0 is not among 3 rows"
    )
