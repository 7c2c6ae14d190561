"""Every rule of the schema, broken once: the refusal names the rollout, the rule and the value."""

from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest

from distrl.errors import SchemaError
from distrl.schema import SCHEMAS, Stage, list_values, record_batch, validate
from tests.builders import (
    generation_batch,
    generation_columns,
    grading_columns,
    reference_batch,
    reference_columns,
    refusal,
    unchecked_batch,
)

IDS = ["p4.0.0", "p4.0.1", "p4.0.2"]
LENGTHS = (2, 3, 1)


def columns_of(stage: Stage) -> dict[str, Any]:
    match stage:
        case Stage.GENERATION:
            return generation_columns(4, LENGTHS)
        case Stage.GRADING:
            return grading_columns(IDS)
        case _:
            return reference_columns(IDS, LENGTHS)


STAGES = (Stage.GENERATION, Stage.GRADING, Stage.REFERENCE)


@pytest.mark.parametrize("stage", STAGES)
def test_a_valid_batch_passes_and_keeps_its_values(stage: Stage) -> None:
    columns = columns_of(stage)
    batch = record_batch(stage, columns)

    assert batch.schema.equals(SCHEMAS[stage], check_metadata=True)
    for name, values in columns.items():
        assert batch.column(name).to_pylist() == values, name


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_without_rows_passes(stage: Stage) -> None:
    record_batch(stage, {name: [] for name in columns_of(stage)})


@pytest.mark.parametrize("stage", STAGES)
def test_arrow_arrays_are_taken_without_a_copy(stage: Stage) -> None:
    source = record_batch(stage, columns_of(stage))
    again = record_batch(stage, {name: source.column(name) for name in source.schema.names})

    first, second = (b.column("rollout_id").buffers()[2].address for b in (source, again))
    assert first == second


def test_missing_and_unknown_columns_are_named() -> None:
    columns = generation_columns()
    columns["reward"] = columns.pop("text")

    assert refusal(SchemaError, lambda: record_batch(Stage.GENERATION, columns)) == (
        "generation batch: columns must be exactly those of the schema; missing ['text'], unknown ['reward']"
    )


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("response_token_ids", [[1], [2**40], [3]], pa.list_(pa.field("item", pa.int32(), nullable=False))),
        ("ticket_id", ["x", "y", "z"], pa.int64()),
        ("text", [1, 2, 3], pa.string()),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_type(name: str, value: Any, kind: pa.DataType) -> None:
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError, OverflowError)) as arrow:
        pa.array(value, type=kind)

    columns = generation_columns(4, LENGTHS) | {name: value}
    assert refusal(SchemaError, lambda: record_batch(Stage.GENERATION, columns)) == (
        f"generation batch: {name} must be {kind}: {arrow.value}"
    )


def test_columns_of_different_lengths_are_refused() -> None:
    columns = grading_columns(IDS) | {"reward": [1.0]}

    assert refusal(SchemaError, lambda: record_batch(Stage.GRADING, columns)) == (
        "grading batch: Arrays were not all the same length: 1 vs 3"
    )


def test_an_arrow_array_that_does_not_fit_the_type_is_refused() -> None:
    columns = reference_columns(IDS, LENGTHS) | {"ref_version": pa.array([0, 2**40, 0], pa.int64())}
    with pytest.raises(SchemaError, match=r"^reference batch: .*1099511627776"):
        record_batch(Stage.REFERENCE, columns)


def test_validate_refuses_a_schema_that_is_not_the_stage_s() -> None:
    batch = pa.RecordBatch.from_pydict({"rollout_id": ["p0.0.0"], "reward": pa.array([1], pa.int64())})

    assert refusal(SchemaError, lambda: validate(Stage.GRADING, batch)) == (
        "grading batch: schema must be that of distrl.schema format 2, got rollout_id: string, reward: int64"
    )


def test_validate_refuses_a_column_of_another_type_under_the_right_name() -> None:
    batch = reference_batch(generation_batch())
    at = batch.schema.names.index("ref_version")
    wide = batch.set_column(at, pa.field("ref_version", pa.int64(), nullable=False), pa.array([0, 0], pa.int64()))
    with pytest.raises(SchemaError, match=r"ref_version: int64"):
        validate(Stage.REFERENCE, wide)


# (stage, column, its values in three rollouts, what the message says after "<stage> batch: rollout ")
BROKEN: list[tuple[Stage, str, list[Any], str]] = [
    (Stage.GENERATION, "text", ["a", None, "c"], "p4.0.1: text must not be null, got None"),
    (Stage.GENERATION, "loss_mask", [[True] * 2, [True] * 3, None], "p4.0.2: loss_mask must not be null, got None"),
    (
        Stage.GENERATION,
        "rollout_id",
        ["p4.0.0", "p4.0.1", "p4.0.0"],
        "p4.0.0: rollout_id must be unique in the batch, got 'p4.0.0'",
    ),
    (
        Stage.GENERATION,
        "response_token_ids",
        [[1, 2], [], [3]],
        "p4.0.1: response_token_ids must hold at least one token, got 0",
    ),
    (
        Stage.GENERATION,
        "behavior_logps",
        [[-1.0, -1.0], [-1.0] * 2, [-1.0]],
        "p4.0.1: behavior_logps must have as many entries as response_token_ids (3), got 2",
    ),
    (
        Stage.GENERATION,
        "policy_versions",
        [[0, 0], [0] * 3, [0, 0]],
        "p4.0.2: policy_versions must have as many entries as response_token_ids (1), got 2",
    ),
    (
        Stage.GENERATION,
        "loss_mask",
        [[True], [True] * 3, [True]],
        "p4.0.0: loss_mask must have as many entries as response_token_ids (2), got 1",
    ),
    (Stage.GENERATION, "policy_versions", [[0, 0], [-1, 0, 0], [0]], "p4.0.1: policy_versions must be >= 0, got -1"),
    (
        Stage.GENERATION,
        "policy_versions",
        [[7, 8], [3, 5, 4], [0]],
        "p4.0.1: policy_versions must never decrease inside a rollout, got 4",
    ),
    (
        Stage.GENERATION,
        "behavior_logps",
        [[-1.0, -2.0], [-1.0, -2.0, float("nan")], [-1.0]],
        "p4.0.1: behavior_logps must be finite, got nan",
    ),
    (
        Stage.GENERATION,
        "behavior_logps",
        [[-1.0, -2.0], [-1.0] * 3, [float("-inf")]],
        "p4.0.2: behavior_logps must be finite, got -inf",
    ),
    (
        Stage.GENERATION,
        "behavior_logps",
        [[-1.0, 0.5], [-1.0] * 3, [-1.0]],
        "p4.0.0: behavior_logps must be <= 0, got 0.5",
    ),
    (
        Stage.GENERATION,
        "finish_reason",
        ["stop", "length", "aborted"],
        "p4.0.2: finish_reason must be one of stop, length, got 'aborted'",
    ),
    (
        Stage.GENERATION,
        "role",
        ["policy", "evaluation", "teacher"],
        "p4.0.2: role must be one of policy, evaluation, opponent, reference, replay, got 'teacher'",
    ),
    (
        Stage.GENERATION,
        "response_token_ids",
        [[1, 2], [1, None, 3], [3]],
        "p4.0.1: response_token_ids must not hold a null, got None",
    ),
    (
        Stage.GENERATION,
        "prompt_token_ids",
        [[1, 2], [3], [None]],
        "p4.0.2: prompt_token_ids must not hold a null, got None",
    ),
    (
        Stage.GENERATION,
        "policy_versions",
        [[0, None], [0] * 3, [0]],
        "p4.0.0: policy_versions must not hold a null, got None",
    ),
    (
        Stage.GENERATION,
        "loss_mask",
        [[True] * 2, [True, True, None], [True]],
        "p4.0.1: loss_mask must not hold a null, got None",
    ),
    (
        Stage.GRADING,
        "verdict",
        ["correct", "wrong", "maybe"],
        "p4.0.2: verdict must be one of correct, wrong, failed, got 'maybe'",
    ),
    (Stage.GENERATION, "v_star", [None, float("inf"), 0.5], "p4.0.1: v_star must be finite, got inf"),
    (Stage.GRADING, "preference", [0.5, None, 1.5], "p4.0.2: preference must be in [0, 1], got 1.5"),
    (Stage.GRADING, "reward", [1.0, float("nan"), 0.0], "p4.0.1: reward must be finite, got nan"),
    (Stage.GRADING, "reward", [1.0, 1.0, float("inf")], "p4.0.2: reward must be finite, got inf"),
    (Stage.GRADING, "reward", [None, 1.0, 1.0], "p4.0.0: reward must not be null, got None"),
    (
        Stage.GRADING,
        "components",
        [[("a", 1.0)], [("a", 1.0), ("b", float("inf"))], []],
        "p4.0.1: components['b'] must be finite, got inf",
    ),
    (
        Stage.GRADING,
        "components",
        [[], [], [("a", None)]],
        "p4.0.2: components['a'] must be finite, got None",
    ),
    (
        Stage.REFERENCE,
        "ref_logps",
        [[-1.0, -1.0], [-1.0] * 3, [1.5]],
        "p4.0.2: ref_logps must be <= 0, got 1.5",
    ),
    (
        Stage.REFERENCE,
        "ref_logps",
        [[-1.0, float("nan")], [-1.0] * 3, [-1.0]],
        "p4.0.0: ref_logps must be finite, got nan",
    ),
]


@pytest.mark.parametrize(("stage", "name", "values", "message"), BROKEN)
def test_a_broken_rule_is_refused_with_rollout_rule_and_value(
    stage: Stage, name: str, values: list[Any], message: str
) -> None:
    columns = columns_of(stage) | {name: values}

    assert refusal(SchemaError, lambda: record_batch(stage, columns)) == f"{stage} batch: rollout {message}"


@pytest.mark.parametrize(("stage", "name", "values", "message"), BROKEN)
def test_a_slice_is_judged_by_its_own_rows(stage: Stage, name: str, values: list[Any], message: str) -> None:
    """The bad row is named from any slice that has it; the slices without it pass."""
    batch = unchecked_batch(stage, columns_of(stage) | {name: values})
    bad = IDS.index(message.partition(":")[0]) if name != "rollout_id" else 2
    if name == "rollout_id":
        validate(stage, batch.slice(1))  # one of the twins is outside
        return
    assert refusal(SchemaError, lambda: validate(stage, batch.slice(bad))) == f"{stage} batch: rollout {message}"
    assert refusal(SchemaError, lambda: validate(stage, batch.slice(bad, 1))) == f"{stage} batch: rollout {message}"
    validate(stage, batch.slice(0, bad))
    validate(stage, batch.slice(bad + 1))


def test_a_version_may_be_lower_than_that_of_the_rollout_before() -> None:
    columns = generation_columns(4, LENGTHS) | {"policy_versions": [[5, 9], [1, 1, 2], [0]]}
    batch = record_batch(Stage.GENERATION, columns)
    validate(Stage.GENERATION, batch.slice(1))


def test_a_log_probability_of_exactly_zero_passes() -> None:
    record_batch(Stage.REFERENCE, reference_columns(IDS, LENGTHS) | {"ref_logps": [[0.0, -0.0], [0.0] * 3, [0.0]]})


def test_a_reason_and_a_preference_may_be_null_and_nothing_else_in_grading() -> None:
    nullable = {field.name for field in SCHEMAS[Stage.GRADING] if field.nullable}
    assert nullable == {"reason", "preference"}


def test_the_journal_has_the_columns_of_all_stages_once() -> None:
    stages = [SCHEMAS[stage].names for stage in STAGES]
    assert SCHEMAS[Stage.JOURNAL].names == stages[0] + stages[1][1:] + stages[2][1:]


@pytest.mark.parametrize(("start", "rows"), [(0, 3), (1, 2), (2, 1), (1, 0), (0, 1)])
@pytest.mark.parametrize("name", ["policy_versions", "behavior_logps", "loss_mask"])
def test_list_values_of_a_slice_are_those_of_its_rows(name: str, start: int, rows: int) -> None:
    column = generation_batch(4, LENGTHS).slice(start, rows).column(name)
    values, offsets = list_values(column)

    assert [values[a:b].tolist() for a, b in pairwise(offsets)] == column.to_pylist()
    assert len(values) == offsets[-1]
