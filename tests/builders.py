"""Valid batches and other small things that many tests need. Every value is a function of the ticket's number."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pyarrow as pa
import pytest

from distrl.graders.grade import Grader
from distrl.graders.limited import LimitedGrader, Limits
from distrl.graders.thread import ThreadPool
from distrl.schema import SCHEMAS, Role, Stage, record_batch
from distrl.tickets import Ticket

DEADLINE_S = 20.0
"""A test that waits longer than this hangs."""


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine to its end; a hang becomes a TimeoutError."""
    return asyncio.run(asyncio.wait_for(coroutine, DEADLINE_S))


def refusal(kind: type[BaseException], call: Callable[[], object]) -> str:
    """The whole message of the error that a call raises."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


def make_ticket(ticket_id: int = 0, group_size: int = 2) -> Ticket:
    return Ticket(ticket_id, 0, f"prompt-{ticket_id}", f"{ticket_id}>", Role.POLICY, group_size, (0, 1, ticket_id, 0))


def generation_columns(
    ticket_id: int = 0, responses: Sequence[int] = (2, 3), prompt: Sequence[int] = (5, 6)
) -> dict[str, Any]:
    """Columns of a valid generation batch.

    Args:
        responses: tokens of each response.
    """
    rows = len(responses)
    return {
        "rollout_id": [f"p{ticket_id}.0.{g}" for g in range(rows)],
        "ticket_id": [ticket_id] * rows,
        "redraw": [0] * rows,
        "prompt_id": [f"prompt-{ticket_id}"] * rows,
        "role": ["policy"] * rows,
        "group_index": list(range(rows)),
        "prompt_token_ids": [list(prompt)] * rows,
        "response_token_ids": [[10 + (ticket_id + g + t) % 7 for t in range(n)] for g, n in enumerate(responses)],
        "behavior_logps": [[-0.25 * (1 + g + t) for t in range(n)] for g, n in enumerate(responses)],
        "policy_versions": [[ticket_id + (t > 0) for t in range(n)] for n in responses],
        "loss_mask": [[True] * n for n in responses],
        "turn_rewards": [[] for _ in responses],
        "turn_ends": [[] for _ in responses],
        "finish_reason": ["stop"] * rows,
        "text": [f"text {ticket_id}.{g}" for g in range(rows)],
        "temperature": [1.0] * rows,
        "top_p": [1.0] * rows,
        "top_k": [0] * rows,
        "max_new_tokens": [8] * rows,
        "engine": ["fake"] * rows,
        "v_star": [None] * rows,
        "generation_started_s": [100.0] * rows,
        "generation_finished_s": [101.0] * rows,
    }


def grading_columns(rollout_ids: Sequence[str]) -> dict[str, Any]:
    rows = len(rollout_ids)
    return {
        "rollout_id": list(rollout_ids),
        "reward": [_number(i) for i in rollout_ids],
        "verdict": ["wrong"] * rows,
        "reason": [None] * rows,
        "components": [[("exact", _number(i))] for i in rollout_ids],
        "grader": ["exact"] * rows,
        "preference": [None] * rows,
        "grading_started_s": [102.0] * rows,
        "grading_finished_s": [103.0] * rows,
    }


def reference_columns(rollout_ids: Sequence[str], responses: Sequence[int]) -> dict[str, Any]:
    rows = len(rollout_ids)
    return {
        "rollout_id": list(rollout_ids),
        "ref_logps": [[-_number(i) - t for t in range(n)] for i, n in zip(rollout_ids, responses, strict=True)],
        "ref_version": [0] * rows,
        "reference_started_s": [102.0] * rows,
        "reference_finished_s": [104.0] * rows,
    }


def generation_batch(
    ticket_id: int = 0, responses: Sequence[int] = (2, 3), prompt: Sequence[int] = (5, 6)
) -> pa.RecordBatch:
    return record_batch(Stage.GENERATION, generation_columns(ticket_id, responses, prompt))


def grading_batch(*generation: pa.RecordBatch) -> pa.RecordBatch:
    """Grades of all rollouts of some generation batches, in their order."""
    return record_batch(Stage.GRADING, grading_columns(_ids(generation)))


def reference_batch(*generation: pa.RecordBatch) -> pa.RecordBatch:
    lengths = [len(row) for batch in generation for row in batch.column("response_token_ids").to_pylist()]
    return record_batch(Stage.REFERENCE, reference_columns(_ids(generation), lengths))


def unchecked_batch(stage: Stage, columns: dict[str, Any]) -> pa.RecordBatch:
    """A batch of the stage's types that nobody has validated."""
    schema = SCHEMAS[stage]
    return pa.RecordBatch.from_arrays([pa.array(columns[f.name], type=f.type) for f in schema], schema=schema)


def _ids(batches: Sequence[pa.RecordBatch]) -> list[str]:
    return [i for batch in batches for i in batch.column("rollout_id").to_pylist()]


def _number(rollout_id: str) -> float:
    """Another number for each rollout: p12.0.3 is 12 + 3/8, which is exact in float32."""
    ticket, _, index = rollout_id[1:].split(".")
    return int(ticket) + int(index) / 8


def threaded(name: str, grader: Grader, timeout_s: float = DEADLINE_S, **limits: Any) -> LimitedGrader:
    """A plain grader as the grading stage calls it."""
    return LimitedGrader(name, ThreadPool(name, grader), Limits(timeout_s, **limits))
