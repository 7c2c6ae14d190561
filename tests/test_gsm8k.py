"""The real GSM8K training file, named in `DISTRL_GSM8K` or at ../shared/data/gsm8k/train.jsonl."""

import json
import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from deploy.check import check_run
from distrl.config import Config, load_config
from distrl.models import load_tokenizer
from distrl.prompts import PromptEncoder
from distrl.rewards import math_verify
from distrl.tasks import load_task

ROOT = Path(__file__).parents[1]
LINES = 7473


@pytest.fixture(scope="module")
def file() -> Path:
    path = Path(os.environ.get("DISTRL_GSM8K", ROOT.parent / "shared/data/gsm8k/train.jsonl"))
    if not path.is_file():
        pytest.skip(f"GSM8K's train.jsonl is not at {path}; name it in DISTRL_GSM8K")
    return path


@pytest.fixture(scope="module")
def config(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The example's config, with a model that the example's script made in two steps of warm-up."""
    directory = tmp_path_factory.mktemp("gsm8k")
    overrides = [f"data.path={file}", f"model.path={directory / 'model'}", f"run.dir={directory / 'runs'}"]
    config = load_config(ROOT / "examples/gsm8k_tiny.yaml", overrides)
    script: dict[str, Any] = runpy.run_path(str(ROOT / "examples/gsm8k_tiny.py"))
    assert script["make_model"](config, config.model.path, steps=2).steps == 2
    return config


def _answers(file: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in file.read_text().splitlines()]


def test_every_gold_answer_is_correct_against_itself(file: Path) -> None:
    answers = _answers(file)
    assert len(answers) == LINES
    wrong = [a for a in answers if math_verify(a, a, {}).verdict != "correct"]
    assert wrong == []


def test_a_wrong_number_grades_zero_for_every_gold_answer(file: Path) -> None:
    accepted = []
    for answer in _answers(file):
        solution, mark, number = answer.rpartition("####")
        assert re.fullmatch(r" -?\d[\d,]*", number)
        other = f"{solution}{mark} {int(number.replace(',', '')) + 1}"
        grade = math_verify(other, answer, {})
        if (grade.reward, grade.verdict) != (0.0, "wrong"):
            accepted.append(other)
    assert accepted == []


def test_the_example_s_config_and_tokenizer_fit_the_file(config: Config) -> None:
    plan = check_run(config)
    assert plan.train_problems + plan.heldout_problems + len(plan.left_out) == LINES
    assert plan.longest_prompt == config.data.max_prompt_tokens
    assert 0 < len(plan.left_out) < LINES // 100
    tokenizer = load_tokenizer(config.model.path)
    problem = load_task(config.data).heldout[0]
    encoded = PromptEncoder(tokenizer).encode(problem.prompt, problem.messages)
    assert tokenizer.decode(encoded) == f"<user>{problem.messages[0].content}<assistant>"
    # What generation takes for the text of a response.
    assert tokenizer.decode(tokenizer.encode("#### 1,234<eos>"), skip_special_tokens=True) == "#### 1,234"


@pytest.mark.ray
def test_the_example_trains_some_steps_on_the_file(config: Config) -> None:
    from deploy.run import run_training

    short = load_config(
        ROOT / "examples/gsm8k_tiny.yaml",
        [
            f"data.path={config.data.path}",
            f"model.path={config.model.path}",
            f"run.dir={config.run.dir}",
            "train.steps=2",
            "train.tickets_per_step=4",
            "rollout.group_size=4",
            "evaluation={problems: 8, every_steps: 0}",
        ],
    )
    summary = run_training(short)
    assert summary["steps"] == 2
    assert summary["tickets"]["trained"] == 8
    assert summary["tickets"]["dropped"] == {}
