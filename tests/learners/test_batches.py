"""From columns to tensors, and the split into micro-batches."""

from random import Random

import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrl.errors import RunError, SchemaError
from distrl.rollouts import join
from learners.batches import Budget, split, training_batch
from tests.builders import generation_batch, grading_batch, reference_batch, refusal

PAD = 0
Stages = tuple[pa.RecordBatch, pa.RecordBatch, pa.RecordBatch | None]


def tickets(reference: bool = True) -> list[Stages]:
    """Three tickets that were generated alone, graded together and scored in another order."""
    generation = [generation_batch(3, (2, 3), (5,)), generation_batch(4, (4, 1), (5, 6, 7)), generation_batch(7, (2,))]
    grading = grading_batch(*generation)
    scores = reference_batch(*reversed(generation)) if reference else None
    return [(batch, grading, scores) for batch in generation]


def test_rows_are_the_rollouts_in_order_with_every_stage_s_values() -> None:
    batch = training_batch(tickets(), PAD)
    rows = [row for stages in tickets() for row in join(*stages).to_pylist()]

    assert batch.response_tokens == 2 + 3 + 4 + 1 + 2
    assert sorted(batch.tensors) == ["behavior_logps", "group", "mask", "ref_logps", "rewards"]
    assert batch.tensors["group"].tolist() == [3, 3, 4, 4, 7]
    assert batch.tensors["rewards"].tolist() == [row["reward"] for row in rows]
    for index, row in enumerate(rows):
        length = len(row["response_token_ids"])
        for name, column in (("behavior_logps", "behavior_logps"), ("ref_logps", "ref_logps"), ("mask", "loss_mask")):
            values = batch.tensors[name][index]
            assert values[:length].tolist() == row[column], name
            assert not values[length:].any(), name
        P = batch.tokens.input_ids.shape[1] - batch.tokens.response_mask.shape[1]
        assert batch.tokens.input_ids[index, P : P + length].tolist() == row["response_token_ids"]
        assert batch.tokens.input_ids[index, P - len(row["prompt_token_ids"]) : P].tolist() == row["prompt_token_ids"]


def test_without_reference_columns_there_is_no_tensor_of_them() -> None:
    assert "ref_logps" not in training_batch(tickets(reference=False), PAD).tensors


def test_values_are_a_tensor_where_every_rollout_has_one() -> None:
    def valued(batch: pa.RecordBatch, value: float | None) -> pa.RecordBatch:
        at = batch.schema.names.index("v_star")
        column = pa.array([value] * batch.num_rows, type=pa.float64())
        return batch.set_column(at, batch.schema.field(at), column)

    some = tickets(reference=False)
    with_values = [(valued(g, v), *rest) for (g, *rest), v in zip(some, (0.5, 0.25, 0.0), strict=True)]
    assert training_batch(with_values, PAD).tensors["v_star"].tolist() == [0.5, 0.5, 0.25, 0.25, 0.0]
    assert "v_star" not in training_batch([with_values[0], some[1]], PAD).tensors


def test_a_token_that_is_not_learned_from_stays_in_the_sequence() -> None:
    generation, grading, reference = tickets()[0]
    at = generation.schema.names.index("loss_mask")
    masks = pa.array([[True, False], [False, True, True]], type=generation.schema.field(at).type)
    batch = training_batch([(generation.set_column(at, generation.schema.field(at), masks), grading, reference)], PAD)
    assert batch.tensors["mask"].tolist() == [[True, False, False], [False, True, True]]
    assert batch.tokens.response_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.response_tokens == 5


def test_tensors_may_be_written_to() -> None:
    batch = training_batch(tickets(), PAD)
    for name, tensor in batch.tensors.items():
        tensor.zero_()
        assert not tensor.any(), name
    assert training_batch(tickets(), PAD).tensors["rewards"].any()


def test_a_ticket_without_its_grades_is_refused() -> None:
    (generation, grading, reference), *rest = tickets()
    assert refusal(SchemaError, lambda: training_batch([(generation, grading.slice(2), reference), *rest], PAD)) == (
        "grading batch: every generated rollout must be there; rollout p3.0.0 is not among 3 rows"
    )


LENGTHS = st.lists(st.lists(st.integers(1, 24), min_size=1, max_size=4), min_size=1, max_size=8)


def rows_of(groups: list[list[int]], rng: Random | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths and tickets of the rows, shuffled."""
    rows = [(length, ticket * 3) for ticket, group in enumerate(groups) for length in group]
    if rng is not None:
        rng.shuffle(rows)  # type: ignore[attr-defined]
    lengths, tickets = zip(*rows, strict=True)
    return torch.tensor(lengths), torch.tensor(tickets)


def cost(part: torch.Tensor, lengths: torch.Tensor, packed: bool) -> int:
    if not len(part):
        return 0
    return int(lengths[part].sum()) if packed else len(part) * int(lengths[part].max())


@given(
    LENGTHS, st.integers(24, 150), st.integers(1, 4), st.booleans(), st.booleans(), st.randoms(use_true_random=False)
)
@settings(max_examples=200, deadline=None)
def test_every_row_is_in_one_micro_batch_within_the_budget_and_workers_pass_equally_often(
    groups: list[list[int]], tokens: int, workers: int, packed: bool, whole: bool, rng: Random
) -> None:
    lengths, tickets = rows_of(groups, rng)
    budget = Budget(max(tokens, 24 * 4 if whole else 0), packed, whole)
    shares = split(lengths, tickets, budget, workers)

    assert len(shares) == workers
    assert len({len(parts) for parts in shares}) == 1
    parts = [part for share in shares for part in share]
    assert sorted(row for part in parts for row in part.tolist()) == list(range(len(lengths)))
    assert all(cost(part, lengths, packed) <= budget.tokens for part in parts)
    if whole:
        where = [{int(tickets[row]) for row in part.tolist()} for part in parts]
        assert sum(len(members) for members in where) == len(groups)
    # Greedy: a worker that ends with more than another was behind before its last, which is at most the largest.
    units = [sum(group) for group in groups] if whole else lengths.tolist()
    loads = [int(sum(lengths[part].sum() for part in share)) for share in shares]
    assert max(loads) - min(loads) <= max(units)
    assert [[p.tolist() for p in s] for s in split(lengths, tickets, budget, workers)] == [
        [p.tolist() for p in s] for s in shares
    ]


def test_rows_of_similar_length_go_together() -> None:
    lengths, tickets = rows_of([[9, 1], [9, 1], [9, 1]])
    assert [part.tolist() for part in split(lengths, tickets, Budget(27), 1)[0]] == [[1, 3, 5], [0, 2, 4]]


def test_packed_rows_cost_their_own_tokens_only() -> None:
    lengths, tickets = rows_of([[9, 1, 1]])
    assert len(split(lengths, tickets, Budget(11, packed=True), 1)[0]) == 1
    assert len(split(lengths, tickets, Budget(11), 1)[0]) == 2


def test_a_response_over_the_budget_is_refused_with_ticket_tokens_and_limit() -> None:
    lengths, tickets = rows_of([[3], [8]])
    assert refusal(RunError, lambda: split(lengths, tickets, Budget(7), 2)) == (
        "train.micro_batch_tokens must be at least the tokens of a response of ticket 3 with its prompt, 8, got 7; "
        "raise it, or lower rollout.max_new_tokens or data.max_prompt_tokens"
    )


def test_a_ticket_that_must_stay_whole_and_does_not_fit_is_refused() -> None:
    lengths, tickets = rows_of([[3, 4]])
    assert len(split(lengths, tickets, Budget(7), 1)[0]) == 2
    assert refusal(RunError, lambda: split(lengths, tickets, Budget(7, whole_groups=True), 1)) == (
        "train.micro_batch_tokens must be at least the tokens of the 2 responses of ticket 0, which the objective "
        "compares, with its prompt, 8, got 7; raise it, or lower rollout.max_new_tokens or data.max_prompt_tokens"
    )
