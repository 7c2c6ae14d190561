"""A tiny reward model: its scores, however they are batched, and what it refuses."""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from distrl.config_sections import PreferenceConfig
from distrl.errors import DataError
from distrl.graders.build import build_graders
from distrl.graders.config import GraderConfig
from distrl.graders.grade import Grade
from distrl.graders.preference import ModelJudge, RewardModelJudge
from distrl.graders.reward_model import RewardModel, content_version
from distrl.preferences import Contestant, make_comparison
from distrl.tasks import Problem
from distrl.tokenizer import character_tokenizer

ALPHABET = "0123456789> "
PROBLEM = Problem.of("12>", "21")
RESPONSES = ["21", "12 ", "0", "9999999999"]


def make(directory: Path, labels: int = 1, seed: int = 0) -> str:
    tokenizer = character_tokenizer(ALPHABET)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=32,
        num_labels=labels,
        pad_token_id=0,
        **sizes,
    )
    torch.manual_seed(seed)
    model = Qwen3ForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.5 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def alone(path: str, response: str, label: int | None = None) -> float:
    """The score by a plain forward pass of one sequence."""
    tokenizer = character_tokenizer(ALPHABET)
    model = Qwen3ForSequenceClassification.from_pretrained(path).eval()
    ids = torch.tensor([tokenizer.encode(PROBLEM.prompt + response)])
    with torch.no_grad():
        logits = model(ids).logits[0]
    return float(logits[0] if label is None else logits.softmax(-1)[label])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_do_not_depend_on_the_batch(tmp_path: Path, batch_size: int) -> None:
    path = make(tmp_path / "rm")
    grades = RewardModel(path, batch_size=batch_size)([PROBLEM] * 4, RESPONSES)
    assert [g.reward for g in grades] == pytest.approx([alone(path, r) for r in RESPONSES], abs=1e-5)
    assert len({g.reward for g in grades}) == 4
    assert all(g.components == {"reward_model": g.reward} for g in grades)


def test_with_several_labels_the_reward_is_a_probability(tmp_path: Path) -> None:
    path = make(tmp_path / "rm", labels=3)
    (grade,) = RewardModel(path, label=2)([PROBLEM], ["21"])
    assert grade.reward == pytest.approx(alone(path, "21", 2), abs=1e-5)


def test_its_version_is_that_of_its_content(tmp_path: Path) -> None:
    first, same, other = (make(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert content_version(Path(first)) == content_version(Path(same)) == RewardModel(first).version
    assert content_version(Path(first)) != content_version(Path(other))


def test_it_grades_as_the_stage_calls_it_and_says_its_version(tmp_path: Path) -> None:
    path = make(tmp_path / "rm")

    async def grade() -> tuple[str, Sequence[Grade]]:
        grader = build_graders({"reward_model": GraderConfig(options={"path": path})}, 2)
        return grader.version, await grader.grade([PROBLEM], ["21"])

    version, (found,) = asyncio.run(grade())
    assert version == f"reward_model@{content_version(Path(path))}"
    assert found.reward == pytest.approx(alone(path, "21"), abs=1e-5)


def test_a_sequence_that_is_too_long_is_a_failure_and_not_cut(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have 43 tokens, the reward model takes 32"):
        RewardModel(make(tmp_path / "rm"))([PROBLEM], ["1" * 40])


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be a Hugging Face directory"):
        RewardModel(str(tmp_path))


def test_a_preference_of_the_model_is_bradley_and_terrys(tmp_path: Path) -> None:
    path = make(tmp_path / "rm")
    one, other = alone(path, "21"), alone(path, "0")
    first, second = ModelJudge(path)([PROBLEM] * 2, ["21", "0"])
    assert first.reward == pytest.approx(1 / (1 + math.exp(other - one)), abs=1e-5)
    assert first.reward + second.reward == pytest.approx(1.0)
    assert first.components["disagreement"] == pytest.approx(0.0, abs=1e-6)


def test_the_same_model_compares_the_responses_of_nash_learning(tmp_path: Path) -> None:
    path = make(tmp_path / "rm")
    one, other = alone(path, "21"), alone(path, "0")
    comparison = make_comparison(PreferenceConfig(function="preference_model", options={"path": path}))
    judge, scored = comparison.judge, []
    assert isinstance(judge, RewardModelJudge)
    model = judge._model
    judge._model = lambda problems, responses: scored.append(list(responses)) or model(problems, responses)  # type: ignore[assignment]
    found = comparison.compare(PROBLEM, Contestant("p0.0.0", "21"), Contestant("o0.0.0", "0"))
    # Either order gives the same scores: one call of the model.
    assert scored == [["21", "0"]]
    assert found.probability == pytest.approx(1 / (1 + math.exp(other - one)), abs=1e-5)
