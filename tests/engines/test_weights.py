"""Which tensors are a policy, and which sets of them are refused."""

import pytest
import torch

from distrl.errors import PolicyError
from distrl.weights import check_newer, check_policy, copy_policy, policy_tensors
from tests.builders import refusal
from tests.engines.tiny import tiny_model


def test_tied_embeddings_appear_once() -> None:
    tied, untied = policy_tensors(tiny_model()), policy_tensors(tiny_model(tie_word_embeddings=False))
    assert "model.embed_tokens.weight" in tied
    assert set(untied) - set(tied) == {"lm_head.weight"}


def test_every_parameter_and_persistent_buffer_is_named_and_no_other_buffer() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    model.register_buffer("scratch", torch.zeros(1), persistent=False)
    batch_norm = {f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert set(policy_tensors(model)) == {"0.weight", "0.bias"} | batch_norm


def test_copied_weights_make_the_models_equal() -> None:
    learner, engine = tiny_model(seed=1), tiny_model(seed=2)
    ids = torch.tensor([[3, 4, 5]])
    assert not torch.equal(engine(ids).logits, learner(ids).logits)
    copy_policy(policy_tensors(engine), policy_tensors(learner))
    assert torch.equal(engine(ids).logits, learner(ids).logits)


def test_copying_converts_the_dtype() -> None:
    target = {"w": torch.zeros(2)}
    copy_policy(target, {"w": torch.tensor([1.5, 2.5], dtype=torch.bfloat16)})
    assert torch.equal(target["w"], torch.tensor([1.5, 2.5]))


EXPECTED = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"a": torch.zeros(2, 3)},
            "policy version 7: tensor 'b' must be given with shape [4], but is missing; "
            "publish distrl.weights.policy_tensors of the same model",
        ),
        (
            {"a": torch.zeros(3, 2), "b": torch.zeros(4)},
            "policy version 7: tensor 'a' must have shape [2, 3], got [3, 2]; "
            "publish distrl.weights.policy_tensors of the same model",
        ),
        (
            {**EXPECTED, "c": torch.zeros(1)},
            "policy version 7: tensor 'c' must be one of the model's 2 tensors, got an unknown name with shape [1]; "
            "publish distrl.weights.policy_tensors of the same model",
        ),
    ],
)
def test_a_set_that_does_not_fit_is_refused_by_name(tensors: dict[str, torch.Tensor], message: str) -> None:
    assert refusal(PolicyError, lambda: check_policy(7, EXPECTED, tensors)) == message


def test_older_weights_are_refused_and_the_same_version_is_not() -> None:
    check_newer(5, 5)
    assert refusal(PolicyError, lambda: check_newer(4, 5)) == (
        "policy version 4: must be >= the loaded version 5; publish older weights under a new version"
    )
