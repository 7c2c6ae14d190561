"""`distrl eval` with vLLM measures what it measures with transformers."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from deploy import evaluate
from distrl.config import make_config
from distrl.rewards import Grade
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from distrl.weights import policy_tensors

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs these tests")

if TYPE_CHECKING:
    from tests.vllm.shared import SharedVllm


def fingerprint(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    """A number that no other response is likely to have, and half of them correct."""
    number = zlib.crc32(response.encode())
    return Grade(number / 2**32, {}, "correct" if number % 2 else "wrong")


def test_a_model_has_the_same_numbers_through_vllm_as_through_transformers(
    shared: "SharedVllm", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engines.tiny import VOCABULARY
    from tests.vllm.shared import model

    tokenizer = character_tokenizer(ALPHABET + "abcdefghij")
    assert len(tokenizer) == VOCABULARY
    sure = model()
    with torch.no_grad():
        sure.model.norm.weight.mul_(20)  # so that at a low temperature the most likely token is all there is
    sure.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def measured(engine: str) -> Any:
        config = make_config(
            {
                "model": {"path": tmp_path},
                "data": {"source": "sort_digits", "heldout_size": 12, "options": {"digits": 4}},
                # The engines draw from other random numbers: there must be nothing to draw.
                "rollout": {"group_size": 2, "max_new_tokens": 12, "temperature": 0.01},
                "generation": {"engine": engine, "slots": 16},
                "reward": {"grader": f"{__name__}:fingerprint"},
                "evaluation": {"problems": 12},
            }
        )
        return evaluate.evaluate_model(config, (), 2, (), lambda *done: None)["sets"]

    expected = measured("transformers")
    engine = shared.engine()
    shared.call(engine.engine.load(1, policy_tensors(sure)))
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "build_engine", lambda config, tokenizer: engine)
        found = measured("vllm")
    (numbers,) = expected
    assert 0.0 < numbers["reward_mean"] < 1.0
    assert numbers["pass_at_k"]["1"]["value"] == numbers["pass_at_k"]["2"]["value"]  # both responses are the same
    assert found == expected
