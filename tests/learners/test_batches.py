"""From columns to tensors, and the split into micro-batches."""

from random import Random

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrl.errors import SchemaError
from distrl.logps import PaddedTokens
from distrl.rollouts import join
from learners.batches import micro_batches, training_batch
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


def shapes(groups: list[list[tuple[int, int]]]) -> tuple[PaddedTokens, torch.Tensor]:
    """Tokens of given (prompt, response) lengths, and the rows' tickets."""
    rows = [row for group in groups for row in group]
    prompts, responses = (torch.tensor(lengths) for lengths in zip(*rows, strict=True))
    mask = torch.arange(int(responses.max())) < responses[:, None]
    ids = torch.zeros(len(rows), int(prompts.max() + responses.max()), dtype=torch.int64)
    group = torch.tensor([ticket * 3 for ticket, group in enumerate(groups) for _ in group])
    return PaddedTokens(ids, prompts, mask), group


LENGTHS = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(
    st.lists(st.lists(LENGTHS, min_size=1, max_size=4), min_size=1, max_size=8),
    st.integers(1, 150),
    st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_micro_batches_are_whole_groups_within_the_bound_and_hold_every_row_once(
    groups: list[list[tuple[int, int]]], most_tokens: int, rng: Random
) -> None:
    tokens, group = shapes(groups)
    order = list(range(len(group)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    tokens, group = (
        PaddedTokens(tokens.input_ids, tokens.prompt_lengths[order], tokens.response_mask[order]),
        group[order],
    )
    parts = micro_batches(tokens, group, most_tokens)

    assert sorted(row for part in parts for row in part.tolist()) == list(range(len(group)))
    where = [{group[row].item() for row in part.tolist()} for part in parts]
    assert sum(len(tickets) for tickets in where) == len(set(group.tolist()))
    for part, members in zip(parts, where, strict=True):
        padded = tokens.rows(part).input_ids.numel()  # what the forward pass will really see
        assert padded <= most_tokens or len(members) == 1


def test_groups_of_similar_length_go_together() -> None:
    tokens, group = shapes([[(1, 9)] * 2, [(1, 1)] * 2, [(1, 9)] * 2, [(1, 1)] * 2])
    assert [part.tolist() for part in micro_batches(tokens, group, 40)] == [[2, 3, 6, 7], [0, 1, 4, 5]]


def test_as_much_goes_into_one_pass_as_the_bound_allows() -> None:
    tokens, group = shapes([[(2, 3)] * 2] * 4)  # 10 padded tokens each
    assert [len(part) for part in micro_batches(tokens, group, 20)] == [4, 4]
    assert [len(part) for part in micro_batches(tokens, group, 19)] == [2, 2, 2, 2]
    assert [len(part) for part in micro_batches(tokens, group, 40)] == [8]


def test_prompts_and_responses_are_padded_apart() -> None:
    """A long prompt with a short response next to the opposite costs the sum of the longest ones."""
    tokens, group = shapes([[(10, 1)], [(1, 10)]])
    assert len(micro_batches(tokens, group, 39)) == 2  # together 2 x (10 + 10)
    assert len(micro_batches(tokens, group, 40)) == 1


@pytest.mark.parametrize("most_tokens", [1, 5])
def test_a_group_that_is_too_large_is_a_micro_batch_of_its_own(most_tokens: int) -> None:
    tokens, group = shapes([[(3, 3)] * 3, [(1, 1)]])
    assert [part.tolist() for part in micro_batches(tokens, group, most_tokens)] == [[3], [0, 1, 2]]
