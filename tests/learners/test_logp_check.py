"""The comparison of recorded log-probabilities with the learner's own, token by token under the version it names."""

import copy
from collections.abc import Sequence

import pyarrow as pa
import pytest
import torch
from transformers import Qwen3ForCausalLM

from distrl.errors import RunError
from distrl.policy_model import PolicyModel
from distrl.sampling import UpdateMode
from distrl.schema import Stage, record_batch
from distrl.weights import copy_policy, policy_tensors
from learners.batches import TrainingBatch, training_batch
from learners.logp_check import LogpCheck, LogpCheckSettings
from tests.builders import generation_columns, grading_batch, refusal
from tests.engines.tiny import PAD, full_logps, tiny_model

PROMPT = (5, 6, 7)
RESPONSE = [3, 9, 2, 14, 8]


def check(
    model: Qwen3ForCausalLM, *, mode: UpdateMode = "keep", rollouts: int = 8, max_staleness: int = 2
) -> LogpCheck:
    return LogpCheck(PolicyModel(model), LogpCheckSettings(rollouts, 0.1, max_staleness, mode, temperature=1.0))


def logps(model: Qwen3ForCausalLM) -> list[float]:
    """Of the response, by a float64 softmax over one plain forward pass."""
    rows = full_logps(model, PROMPT, RESPONSE)
    return rows.gather(1, torch.tensor(RESPONSE)[:, None])[:, 0].tolist()


def batch(*rollouts: tuple[Sequence[int], Sequence[float]], engines: Sequence[str] = ()) -> TrainingBatch:
    """One ticket whose rollouts have the same tokens.

    Args:
        rollouts: versions and recorded log-probabilities of each.
    """
    n = len(rollouts)
    columns = generation_columns(4, [len(RESPONSE)] * n, PROMPT) | {
        "response_token_ids": [RESPONSE] * n,
        "policy_versions": [list(versions) for versions, _ in rollouts],
        "behavior_logps": [list(recorded) for _, recorded in rollouts],
        "engine": list(engines) or ["generation-0"] * n,
    }
    generation: pa.RecordBatch = record_batch(Stage.GENERATION, columns)
    return training_batch([(generation, grading_batch(generation), None)], PAD)


def two_versions() -> tuple[Qwen3ForCausalLM, list[float], list[float]]:
    """A model with the weights of version 1, and the response's log-probabilities under versions 1 and 2."""
    old, new = tiny_model(seed=1), tiny_model(seed=2)
    assert max(abs(a - b) for a, b in zip(logps(old), logps(new), strict=True)) > 0.5
    return old, logps(old), logps(new)


def update(model: Qwen3ForCausalLM) -> None:
    copy_policy(policy_tensors(model), policy_tensors(tiny_model(seed=2)))


def test_what_the_model_gives_itself_does_not_differ() -> None:
    model = tiny_model()
    found = check(model)(batch(([0] * 5, logps(model))), version=0, step=1)
    assert found["logp_mismatch_tokens"] == 5
    assert found["logp_mismatch_max"] == found["logp_mismatch_max.generation-0"] < 1e-5
    assert "kept_cache_distance_mean" not in found


def test_mean_and_largest_difference_are_told_apart_by_engine() -> None:
    model = tiny_model()
    right = logps(model)
    off = [logp - d for logp, d in zip(right, (0.01, 0.02, 0.03, 0.0, 0.04), strict=True)]
    found = check(model)(batch(([0] * 5, right), ([0] * 5, off), engines=("a", "b")), version=0, step=1)
    assert found["logp_mismatch_mean.b"] == pytest.approx(0.02, abs=1e-5)
    assert found["logp_mismatch_max.b"] == pytest.approx(0.04, abs=1e-5)
    assert found["logp_mismatch_max.a"] < 1e-5
    assert found["logp_mismatch_mean"] == pytest.approx(0.01, abs=1e-5)


def test_a_token_is_compared_under_the_version_it_names_also_after_the_next_step() -> None:
    model, old, new = two_versions()
    compare = check(model)
    compare.published(1)
    update(model)
    compare.published(2)
    found = compare(batch(([1] * 5, old), ([2] * 5, new)), version=2, step=3)
    assert found["logp_mismatch_tokens"] == 10
    assert found["logp_mismatch_max"] < 1e-5


def test_a_copy_is_kept_until_its_tokens_have_come_and_then_given_up_for_the_next() -> None:
    model, old, new = two_versions()
    compare = check(model)
    compare.published(1)
    update(model)
    compare.published(2)  # the copy of version 1 stays
    assert compare(batch(([1] * 5, old)), version=2, step=3)["logp_mismatch_tokens"] == 5
    assert compare(batch(([1] * 5, old)), version=2, step=4) == {}  # given up
    compare.published(3)
    assert compare(batch(([3] * 5, new)), version=4, step=5)["logp_mismatch_max"] < 1e-5


def test_a_copy_whose_tokens_never_came_gives_way() -> None:
    model, _, new = two_versions()
    compare = check(model, max_staleness=2)
    compare.published(1)
    update(model)
    for version in (2, 3, 4):
        compare.published(version)
    assert compare(batch(([4] * 5, new)), version=5, step=6)["logp_mismatch_tokens"] == 5


def test_a_synchronous_run_copies_nothing() -> None:
    model, old, _ = two_versions()
    compare = check(model, max_staleness=0)
    compare.published(1)
    update(model)
    assert compare(batch(([1] * 5, old)), version=2, step=3) == {}


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_a_rollout_of_two_versions_is_compared_segment_by_segment(mode: UpdateMode) -> None:
    model, old, new = two_versions()
    compare = check(model, mode=mode)
    compare.published(1)
    update(model)
    # 0.02 nats off after the update, as where keys and values of the old weights were kept.
    recorded = [*old[:2], *(logp - 0.02 for logp in new[2:])]
    found = compare(batch(([1, 1, 2, 2, 2], recorded)), version=2, step=3)
    if mode == "keep":
        assert (found["logp_mismatch_tokens"], found["kept_cache_distance_tokens"]) == (2, 3)
        assert found["logp_mismatch_max"] < 1e-5
        assert found["kept_cache_distance_mean"] == pytest.approx(0.02, abs=1e-5)
        assert found["kept_cache_distance_max"] == pytest.approx(0.02, abs=1e-5)
    else:
        assert found["logp_mismatch_tokens"] == 5
        assert found["logp_mismatch_mean"] == pytest.approx(0.012, abs=1e-5)
        assert "kept_cache_distance_tokens" not in found


def test_a_mean_above_the_bound_stops_training_and_names_the_engine() -> None:
    model = tiny_model()
    right = logps(model)
    off = [logp - 0.25 for logp in right]
    rollouts = batch(([0] * 5, right), ([0] * 5, off), engines=("generation-0", "generation-1"))
    assert refusal(RunError, lambda: check(model)(rollouts, version=0, step=7)) == (
        "step 7: recorded log-probabilities must be within train.logp_mismatch_bound = 0.1 nats of the learner's under "
        "the same weights on average, got 0.25 (largest 0.25) over 5 tokens of generation-1; it samples from other "
        "weights than it says or computes otherwise: compare its model, dtype and engine arguments, or raise the bound"
    )


def test_a_token_that_names_the_wrong_version_is_found() -> None:
    model, old, _ = two_versions()
    compare = check(model)
    update(model)
    with pytest.raises(RunError, match="samples from other weights than it says"):
        compare(batch(([2] * 5, old)), version=2, step=3)


def test_only_so_many_rollouts_are_compared_as_asked_for() -> None:
    model = tiny_model()
    rollouts = batch(*[([0] * 5, logps(model))] * 6)
    assert check(model, rollouts=2)(rollouts, version=0, step=1)["logp_mismatch_tokens"] == 10
    assert check(model, rollouts=0)(rollouts, version=0, step=1) == {}


def test_the_weights_are_the_same_afterwards() -> None:
    model, old, _ = two_versions()
    compare = check(model)
    compare.published(1)
    update(model)
    before = copy.deepcopy(policy_tensors(model))
    compare(batch(([1] * 5, old)), version=2, step=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy_tensors(model).items())


def test_what_an_environment_said_is_not_compared() -> None:
    model = tiny_model()
    recorded = logps(model)
    made = batch(([0] * len(RESPONSE), recorded))
    made.tensors["behavior_logps"][0, 1] = -9.0
    with pytest.raises(RunError):
        check(model)(made, 0, 1)
    made.tensors["mask"][0, 1] = False
    found = check(model)(made, 0, 1)
    assert found["logp_mismatch_tokens"] == len(RESPONSE) - 1
    assert found["logp_mismatch_max"] < 1e-5
