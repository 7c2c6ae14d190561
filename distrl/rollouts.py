"""Joins the columns of the stages into one row per rollout, by rollout id."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distrl.errors import SchemaError
from distrl.schema import SCHEMAS, Stage


def join(generation: pa.RecordBatch, grading: pa.RecordBatch, reference: pa.RecordBatch | None) -> pa.RecordBatch:
    """All columns of a ticket's rollouts, in the order of the generation batch.

    `grading` and `reference` may hold more rows (a call covers several tickets) in any order. Columns whose rows
    already stand in one run in the right order are sliced without a copy. A batch that was joined before is returned
    as it is.

    Raises:
        SchemaError: a rollout is missing from a stage's batch, or has another number of reference log-probabilities
            than tokens.
    """
    if generation.schema.names == SCHEMAS[Stage.JOURNAL].names:
        return generation  # read back from the journal, where it was joined
    ids: list[str] = generation.column("rollout_id").to_pylist()
    rows = generation.num_rows
    columns: list[pa.Array] = list(generation.columns)
    columns += _aligned(Stage.GRADING, grading, ids).columns[1:]
    reference_fields = SCHEMAS[Stage.REFERENCE].names[1:]
    if reference is None:
        journal = SCHEMAS[Stage.JOURNAL]
        columns += [pa.nulls(rows, journal.field(name).type) for name in reference_fields]
    else:
        scored = _aligned(Stage.REFERENCE, reference, ids)
        _check_lengths(generation, scored)
        columns += scored.columns[1:]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMAS[Stage.JOURNAL])


def _aligned(stage: Stage, batch: pa.RecordBatch, ids: Sequence[str]) -> pa.RecordBatch:
    found: list[str] = batch.column("rollout_id").to_pylist()
    position = {rollout_id: row for row, rollout_id in enumerate(found)}
    try:
        order = [position[rollout_id] for rollout_id in ids]
    except KeyError as missing:
        raise SchemaError(
            f"{stage} batch: every generated rollout must be there; rollout {missing.args[0]} is not among "
            f"{len(found)} rows"
        ) from None
    first = order[0]
    if order == list(range(first, first + len(order))):
        return batch.slice(first, len(order))
    return batch.take(pa.array(np.asarray(order)))


def _check_lengths(generation: pa.RecordBatch, scored: pa.RecordBatch) -> None:
    tokens = pc.list_value_length(generation.column("response_token_ids")).to_pylist()
    found = pc.list_value_length(scored.column("ref_logps")).to_pylist()
    for rollout_id, want, got in zip(scored.column("rollout_id").to_pylist(), tokens, found, strict=True):
        if want != got:
            raise SchemaError(
                f"{Stage.REFERENCE} batch: rollout {rollout_id}: ref_logps must have as many entries as "
                f"response_token_ids ({want}), got {got}"
            )
