"""Arrow schemas of what the stages hand to each other, and the rules that every batch must keep.

A batch is validated where it is produced, so that a fault is found beside its cause. Each stage owns its columns;
`rollout_id` ties them together (see `distrl.rollouts`). Lists have one entry per response token, the
end-of-sequence token included; `turn_rewards` and `turn_ends` have one per turn of an episode, and are empty where
there is none.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distrl.errors import SchemaError

FORMAT = 2
"""Version of the schemas, which journal files carry; one more with every column that is added, renamed or changed. A
reader refuses any other."""


class Stage(StrEnum):
    GENERATION = "generation"
    GRADING = "grading"
    REFERENCE = "reference"
    JOURNAL = "journal"


class Role(StrEnum):
    """Who a rollout is sampled for."""

    POLICY = "policy"
    EVALUATION = "evaluation"
    OPPONENT = "opponent"
    """What a policy's rollout is compared with; never trained, not counted for staleness."""
    REFERENCE = "reference"
    """Sampled from the reference model, for what is estimated before or beside training."""
    REPLAY = "replay"
    """Recorded by another run and trained again. Its policy versions are those of that run, and name no weights of
    this one."""


def _field(name: str, kind: pa.DataType, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable)


def _tokens(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("item", kind, nullable=False)), nullable=False)


def _schema(stage: Stage, fields: list[pa.Field]) -> pa.Schema:
    return pa.schema(fields, metadata={"distrl.stage": stage.value, "distrl.format": str(FORMAT)})


_ROLLOUT_ID = _field("rollout_id", pa.string())

_GENERATION_FIELDS = [
    _ROLLOUT_ID,
    _field("ticket_id", pa.int64()),
    _field("redraw", pa.int32()),
    _field("prompt_id", pa.string()),
    _field("role", pa.string()),
    _field("group_index", pa.int32()),
    _tokens("prompt_token_ids", pa.int32()),
    _tokens("response_token_ids", pa.int32()),
    _tokens("behavior_logps", pa.float32()),
    _tokens("policy_versions", pa.int32()),
    _tokens("loss_mask", pa.bool_()),
    _tokens("turn_rewards", pa.float64()),
    _tokens("turn_ends", pa.int32()),
    _field("finish_reason", pa.string()),
    _field("text", pa.string()),
    _field("temperature", pa.float32()),
    _field("top_p", pa.float32()),
    _field("top_k", pa.int32()),
    _field("max_new_tokens", pa.int32()),
    _field("engine", pa.string()),
    _field("v_star", pa.float64(), nullable=True),
    _field("generation_started_s", pa.float64()),
    _field("generation_finished_s", pa.float64()),
]
_GRADING_FIELDS = [
    _ROLLOUT_ID,
    _field("reward", pa.float64()),
    _field("verdict", pa.string()),
    _field("reason", pa.string(), nullable=True),
    _field("components", pa.map_(pa.string(), pa.float64())),
    _field("grader", pa.string()),
    _field("preference", pa.float64(), nullable=True),
    _field("grading_started_s", pa.float64()),
    _field("grading_finished_s", pa.float64()),
]
_REFERENCE_FIELDS = [
    _ROLLOUT_ID,
    _tokens("ref_logps", pa.float32()),
    _field("ref_version", pa.int32()),
    _field("reference_started_s", pa.float64()),
    _field("reference_finished_s", pa.float64()),
]

SCHEMAS: dict[Stage, pa.Schema] = {
    Stage.GENERATION: _schema(Stage.GENERATION, _GENERATION_FIELDS),
    Stage.GRADING: _schema(Stage.GRADING, _GRADING_FIELDS),
    Stage.REFERENCE: _schema(Stage.REFERENCE, _REFERENCE_FIELDS),
    # A run without reference scoring leaves those columns null.
    Stage.JOURNAL: _schema(
        Stage.JOURNAL,
        _GENERATION_FIELDS + _GRADING_FIELDS[1:] + [f.with_nullable(True) for f in _REFERENCE_FIELDS[1:]],
    ),
}

_PER_TOKEN = ("behavior_logps", "policy_versions", "loss_mask")
_VERDICTS = ("correct", "wrong", "failed")
_FINISH_REASONS = ("stop", "length")


def record_batch(stage: Stage, columns: dict[str, object]) -> pa.RecordBatch:
    """A validated batch of a stage from Python values or Arrow arrays.

    Raises:
        SchemaError: a column is missing, unknown, of another type, or breaks a rule of `validate`.
    """
    schema = SCHEMAS[stage]
    if set(columns) != set(schema.names):
        missing, unknown = set(schema.names) - set(columns), set(columns) - set(schema.names)
        raise SchemaError(
            f"{stage} batch: columns must be exactly those of the schema; "
            f"missing {sorted(missing)}, unknown {sorted(unknown)}"
        )
    arrays = []
    for field in schema:
        value = columns[field.name]
        try:
            arrays.append(value if isinstance(value, pa.Array) else pa.array(value, type=field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise SchemaError(f"{stage} batch: {field.name} must be {field.type}: {error}") from error
    try:
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    except (ValueError, TypeError) as error:  # other lengths, or a type that cannot be cast
        raise SchemaError(f"{stage} batch: {error}") from error
    validate(stage, batch)
    return batch


def validate(stage: Stage, batch: pa.RecordBatch) -> None:
    """Check a batch against its stage's schema and rules.

    Rules: types and nullability; unique rollout ids; equal list lengths per rollout; at least one response token;
    finite numbers; log-probabilities <= 0; policy versions >= 0 that never decrease inside a rollout; known verdicts
    and finish reasons.

    Raises:
        SchemaError: the first broken rule, with the rollout's id, the rule and the value.
    """
    schema = SCHEMAS[stage]
    if batch.schema.names != schema.names or any(a.type != b.type for a, b in zip(batch.schema, schema, strict=True)):
        raise SchemaError(
            f"{stage} batch: schema must be that of distrl.schema format {FORMAT}, "
            f"got {', '.join(f'{f.name}: {f.type}' for f in batch.schema)}"
        )
    for field in schema:
        if not field.nullable and batch.column(field.name).null_count:
            row = int(np.flatnonzero(_numpy(pc.is_null(batch.column(field.name))))[0])
            _refuse(stage, batch, row, f"{field.name} must not be null", None)
        if pa.types.is_list(field.type) and batch.column(field.name).flatten().null_count:
            rows = batch.column(field.name).to_pylist()
            row = next(i for i, values in enumerate(rows) if values is not None and None in values)
            _refuse(stage, batch, row, f"{field.name} must not hold a null", None)
    ids = batch.column("rollout_id")
    if len(pc.unique(ids)) != len(ids):
        values = ids.to_pylist()
        row = next(i for i, value in enumerate(values) if value in values[:i])
        _refuse(stage, batch, row, "rollout_id must be unique in the batch", ids[row].as_py())
    for check in _CHECKS[stage]:
        check(stage, batch)


def _refuse(stage: Stage, batch: pa.RecordBatch, row: int, rule: str, value: object) -> None:
    name = batch.column("rollout_id")[row].as_py()
    raise SchemaError(f"{stage} batch: rollout {name}: {rule}, got {value!r}")


def _numpy(array: pa.Array) -> NDArray[Any]:
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values


def _lengths(batch: pa.RecordBatch, name: str) -> NDArray[np.int64]:
    return _numpy(pc.list_value_length(batch.column(name))).astype(np.int64)


def list_values(column: pa.Array) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The flat values of a list column and each row's [rows + 1] offsets into them."""
    offsets = _numpy(column.offsets).astype(np.int64)
    values = _numpy(column.values)[offsets[0] : offsets[-1]]
    return values, offsets - offsets[0]


def _first_bad_row(bad: NDArray[np.bool_], offsets: NDArray[np.int64]) -> tuple[int, int] | None:
    positions = np.flatnonzero(bad)
    if not len(positions):
        return None
    position = int(positions[0])
    return int(np.searchsorted(offsets, position, side="right")) - 1, position


def _check_tokens(stage: Stage, batch: pa.RecordBatch) -> None:
    tokens = _lengths(batch, "response_token_ids")
    for row in np.flatnonzero(tokens < 1):
        _refuse(stage, batch, int(row), "response_token_ids must hold at least one token", int(tokens[row]))
    for name in _PER_TOKEN:
        lengths = _lengths(batch, name)
        for row in np.flatnonzero(lengths != tokens):
            rule = f"{name} must have as many entries as response_token_ids ({tokens[row]})"
            _refuse(stage, batch, int(row), rule, int(lengths[row]))


def _check_turns(stage: Stage, batch: pa.RecordBatch) -> None:
    tokens, turns = _lengths(batch, "response_token_ids"), _lengths(batch, "turn_rewards")
    rows = zip(batch.column("turn_rewards").to_pylist(), batch.column("turn_ends").to_pylist(), strict=True)
    for row, (rewards, ends) in enumerate(rows):
        if len(ends) != turns[row]:
            rule = f"turn_ends must have as many entries as turn_rewards ({turns[row]})"
            _refuse(stage, batch, row, rule, len(ends))
        if not all(np.isfinite(rewards)):
            _refuse(stage, batch, row, "turn_rewards must be finite", rewards)
        if ends != sorted(set(ends)) or any(not 0 < end <= tokens[row] for end in ends):
            _refuse(stage, batch, row, f"turn_ends must rise, from 1 to the number of tokens ({tokens[row]})", ends)


def _check_versions(stage: Stage, batch: pa.RecordBatch) -> None:
    values, offsets = list_values(batch.column("policy_versions"))
    inner = np.ones(len(values), dtype=bool)
    inner[offsets[:-1]] = False  # the first token of a rollout has no predecessor
    steps_back = np.zeros(len(values), dtype=bool)
    steps_back[1:] = (values[1:] < values[:-1]) & inner[1:]
    for bad, rule in ((values < 0, "must be >= 0"), (steps_back, "must never decrease inside a rollout")):
        found = _first_bad_row(bad, offsets)
        if found:
            _refuse(stage, batch, found[0], f"policy_versions {rule}", values[found[1]].item())


def _check_finish_reasons(stage: Stage, batch: pa.RecordBatch) -> None:
    _check_words(stage, batch, "finish_reason", _FINISH_REASONS)
    _check_words(stage, batch, "role", tuple(Role))


def _check_words(stage: Stage, batch: pa.RecordBatch, name: str, words: tuple[str, ...]) -> None:
    for row, value in enumerate(batch.column(name).to_pylist()):
        if value not in words:
            _refuse(stage, batch, row, f"{name} must be one of {', '.join(words)}", value)


def _check_values(stage: Stage, batch: pa.RecordBatch) -> None:
    """v_star is null where the objective reads none, else finite."""
    for row, value in enumerate(batch.column("v_star").to_pylist()):
        if value is not None and not np.isfinite(value):
            _refuse(stage, batch, row, "v_star must be finite", value)


def _logps_check(name: str) -> Callable[[Stage, pa.RecordBatch], None]:
    def check(stage: Stage, batch: pa.RecordBatch) -> None:
        values, offsets = list_values(batch.column(name))
        for bad, rule in ((~np.isfinite(values.astype(np.float64)), "be finite"), (values > 0, "be <= 0")):
            found = _first_bad_row(bad, offsets)
            if found:
                _refuse(stage, batch, found[0], f"{name} must {rule}", values[found[1]].item())

    return check


def _check_grades(stage: Stage, batch: pa.RecordBatch) -> None:
    _check_words(stage, batch, "verdict", _VERDICTS)
    rewards = _numpy(batch.column("reward"))
    for row in np.flatnonzero(~np.isfinite(rewards.astype(np.float64))):
        _refuse(stage, batch, int(row), "reward must be finite", rewards[row].item())
    for index, value in enumerate(batch.column("preference").to_pylist()):
        if value is not None and not 0.0 <= value <= 1.0:
            _refuse(stage, batch, index, "preference must be in [0, 1]", value)
    for index, components in enumerate(batch.column("components").to_pylist()):
        for name, value in components:
            if value is None or not np.isfinite(value):
                _refuse(stage, batch, index, f"components[{name!r}] must be finite", value)


_CHECKS: dict[Stage, tuple[Callable[[Stage, pa.RecordBatch], None], ...]] = {
    Stage.GENERATION: (
        _check_tokens,
        _check_turns,
        _check_versions,
        _logps_check("behavior_logps"),
        _check_finish_reasons,
        _check_values,
    ),
    Stage.GRADING: (_check_grades,),
    Stage.REFERENCE: (_logps_check("ref_logps"),),
    Stage.JOURNAL: (),  # joined from batches that were validated where they were made
}
