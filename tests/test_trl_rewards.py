"""Reward functions as TRL's documentation writes them, and what may go wrong in one."""

import math
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from deploy.check import check_run
from distrl.config import make_config
from distrl.errors import ConfigError, StageError
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.rewards import Grade, check_columns, make_grader
from distrl.tasks import Message, Problem
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer

Register = Callable[[Callable[..., Any]], str]

PLAIN = [Problem.of("3 + 3 =", "6", {"ground_truth": "6", "level": 1}), Problem.of("2 + 2 =", "4", {"level": 2})]
CHAT = [Problem.of([Message("system", "Be brief."), Message("user", "3 + 3?")], "6")]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Gives a function a name under which it can be imported."""
    module = ModuleType("users_rewards")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def name(function: Callable[..., Any]) -> str:
        setattr(module, function.__name__, function)
        return f"users_rewards:{function.__name__}"

    return name


def _recorded(register: Register, problems: list[Problem], responses: list[str]) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def reward(completions: Any, **kwargs: Any) -> list[float]:
        seen.update(kwargs, completions=completions)
        return [0.0] * len(completions)

    make_grader(register(reward))(problems, responses)
    return seen


def test_functions_of_trls_documentation_work_unchanged(register: Register) -> None:
    # https://huggingface.co/docs/trl/main/en/grpo_trainer, the three examples of reward functions.
    def reward_len(completions, **kwargs):  # type: ignore[no-untyped-def]
        return [float(len(completion)) for completion in completions]

    def format_reward_func(completions, **kwargs):  # type: ignore[no-untyped-def]
        pattern = r"^<think>.*?</think><answer>.*?</answer>$"
        completion_contents = [completion[0]["content"] for completion in completions]
        matches = [re.match(pattern, content) for content in completion_contents]
        return [1.0 if match else 0.0 for match in matches]

    def reward_func(completions, ground_truth, **kwargs):  # type: ignore[no-untyped-def]
        matches = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
        contents = [match.group(1) if match else "" for match in matches]
        return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth, strict=True)]

    def rewards(function: Callable[..., Any], problems: list[Problem], responses: list[str]) -> list[float]:
        return [g.reward for g in make_grader(register(function))(problems, responses)]

    assert rewards(reward_len, PLAIN, ["abc", ""]) == [3.0, 0.0]
    good = "<think>a</think><answer>6</answer>"
    assert rewards(format_reward_func, CHAT * 2, [good, f"{good}!"]) == [1.0, 0.0]
    assert rewards(reward_func, [PLAIN[0]] * 2, ["so \\boxed{6}", "6"]) == [1.0, 0.0]


def test_texts_stay_texts_and_columns_are_lists(register: Register) -> None:
    assert _recorded(register, PLAIN, ["6", "5"]) == {
        "prompts": ["3 + 3 =", "2 + 2 ="],
        "completions": ["6", "5"],
        "answer": ["6", "4"],
        "level": [1, 2],
        "ground_truth": ["6", None],
    }


def test_conversations_are_lists_of_messages(register: Register) -> None:
    seen = _recorded(register, CHAT, ["6"])
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 3?"}]
    assert seen["prompts"] == [turns]
    assert seen["completions"] == [[{"role": "assistant", "content": "6"}]]


def test_a_function_gets_only_what_it_names(register: Register) -> None:
    def strict(completions: Any, level: Any, epoch: int = 5) -> list[float]:
        return [n / epoch for n in level]

    grades = make_grader(register(strict))(PLAIN, ["", ""])
    assert grades[1] == Grade(0.4, {"strict": 0.4}, "wrong")


def test_asynchronous_functions_and_arrays_are_accepted(register: Register) -> None:
    async def slow(completions: Any, **kwargs: Any) -> Any:
        return np.array([1.0, 0.5], dtype=np.float32)

    assert [(g.reward, g.verdict) for g in make_grader(register(slow))(PLAIN, ["", ""])] == [
        (1.0, "correct"),
        (0.5, "wrong"),
    ]


def raises(completions: Any, **kwargs: Any) -> Any:
    raise KeyError("solution")


def too_short(completions: Any, **kwargs: Any) -> Any:
    return [1.0]


def a_number(completions: Any, **kwargs: Any) -> Any:
    return 1.0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (raises, "KeyError: 'solution'"),
        (too_short, "ValueError: it must return one reward per completion (2), got 1"),
        (a_number, "TypeError: it must return a list of rewards, got 1.0"),
    ],
)
def test_failure_is_an_error_with_function_and_prompt(
    register: Register, function: Callable[..., Any], reason: str
) -> None:
    name = register(function)
    with pytest.raises(StageError) as error:
        make_grader(name)([PLAIN[0]] * 2, ["6", "5"])
    assert str(error.value) == f"grader {name} failed on prompt {PLAIN[0].prompt_id}: {reason}"
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "it must give a Grade or a number, got None"),
        (math.nan, "reward must be a finite number, got nan"),
        (math.inf, "reward must be a finite number, got inf"),
    ],
)
def test_a_reward_that_is_none_or_not_finite_is_a_failure_never_a_zero(
    register: Register, value: Any, reason: str
) -> None:
    def partly(completions: Any, **kwargs: Any) -> Any:
        return [1.0, value]

    name = register(partly)
    with pytest.raises(StageError) as error:
        make_grader(name)(PLAIN, ["6", "5"])
    assert str(error.value) == f"grader {name} failed on prompt {PLAIN[1].prompt_id}: {reason}"


def test_a_function_that_needs_what_the_data_lacks_is_refused_before_the_run(
    register: Register, tmp_path: Path
) -> None:
    def needs(completions: Any, solution: Any, completion_ids: Any, scale: float = 1.0, **kwargs: Any) -> Any:
        return []

    message = (
        "reward.grader users_rewards:needs must be given every argument that it needs, got none for solution, "
        "completion_ids; the columns of the data are {}: name the others in data.columns, or give the arguments "
        "defaults"
    )
    name = register(needs)
    with pytest.raises(ConfigError) as error:
        check_columns(name, PLAIN[1])
    assert str(error.value) == message.format("answer, level")
    size = TinyArchitecture(hidden_size=8, layers=1, heads=2, intermediate_size=8)
    make_tiny_model(tmp_path, character_tokenizer(ALPHABET), seed=0, architecture=size)
    config = make_config({"model": {"path": tmp_path}, "data": {}, "reward": {"grader": name}})
    with pytest.raises(ConfigError) as error:
        check_run(config)
    assert str(error.value) == message.format("answer")


def test_other_graders_need_no_columns(register: Register) -> None:
    def grade(response: str, answer: str, metadata: Any) -> float:
        return 1.0

    for name in ("exact", register(grade)):
        check_columns(name, PLAIN[0])


def test_a_built_in_grader_without_answers_is_refused(tmp_path: Path) -> None:
    size = TinyArchitecture(hidden_size=8, layers=1, heads=2, intermediate_size=8)
    make_tiny_model(tmp_path / "model", character_tokenizer(ALPHABET), seed=0, architecture=size)
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(f'{{"prompt": "{n}"}}\n' for n in range(100)))
    data = {"source": "jsonl", "path": str(lines), "answer_key": ""}
    with pytest.raises(ConfigError) as error:
        check_run(make_config({"model": {"path": tmp_path / "model"}, "data": data}))
    assert str(error.value) == (
        "reward.grader must be a function of your own where data.answer_key is '' and there are no answers, got "
        "'exact'; set it to module:function, or name the column of the answers in data.answer_key"
    )
