"""Every form of grader gives the same rewards as calling it by hand, and its faults are failures."""

import pytest

from distrl.errors import ConfigError, StageError
from distrl.rewards import Grade, make_grader
from distrl.tasks import Message, Problem
from tests.builders import refusal

HERE = "tests.graders.users_graders"
PROBLEMS = [Problem.of("2 + 3 =", "5", {"level": 2}), Problem.of("1 + 3 =", "4", {"level": 1})]


@pytest.mark.parametrize(
    ("name", "rewards"),
    [
        ("plain", [1.0, 0.0]),
        ("plain_async", [2.0, 0.0]),
        ("trl", [1.0, 0.0]),
        ("trl_async", [1.0, 0.0]),
        ("verifiers_function", [1.0, 0.0]),
        ("async_length", [1.0, 2.0]),
        ("Rubric", [1.0 + 0.5 * 1, 0.0 + 0.5 * 2]),
        ("reasoning_gym_scorer", [0.5, 0.0]),
        ("DATASET", [1.0, 0.0]),
    ],
)
def test_each_form_is_called_with_what_it_names(name: str, rewards: list[float]) -> None:
    grades = make_grader(f"{HERE}:{name}")(PROBLEMS, ["5", "55"])
    assert [grade.reward for grade in grades] == rewards


def test_a_rubric_keeps_each_functions_value_as_a_component() -> None:
    (grade,) = make_grader(f"{HERE}:Rubric")(PROBLEMS[:1], ["5"])
    assert grade.components == {"verifiers_function": 1.0, "async_length": 1.0}


def test_a_conversation_gives_a_verifiers_function_messages() -> None:
    problem = Problem.of([Message("user", "2 + 3?")], "5", {"info": {"level": 3}})
    assert make_grader(f"{HERE}:chat_content")([problem], ["5"])[0].reward == 3.0


def test_arrow_rows_may_come_in_any_order_and_twice() -> None:
    grades = make_grader(f"{HERE}:arrow_in_any_order")(PROBLEMS, ["0.25", "0.75"])
    assert grades == [Grade(0.25, {}, "wrong", "row 0"), Grade(0.75, {}, "wrong", "row 1")]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("arrow_that_leaves_one_out", "it must return one grade per response (2), got none for rows [1]"),
        (
            "arrow_that_contradicts_itself",
            "row 0 must have one grade, got Grade(reward=0.0, components={}, verdict='wrong', reason=None) and "
            "Grade(reward=1.0, components={}, verdict='correct', reason=None)",
        ),
    ],
)
def test_arrow_columns_that_are_no_grades_are_a_failure(name: str, cause: str) -> None:
    prompts = ", ".join(problem.prompt_id for problem in PROBLEMS)
    assert refusal(StageError, lambda: make_grader(f"{HERE}:{name}")(PROBLEMS, ["", ""])) == (
        f"grader {HERE}:{name} failed on prompt {prompts}: ValueError: {cause}"
    )


@pytest.mark.parametrize("name", ["Scaled", "scaled"])
def test_options_are_arguments(name: str) -> None:
    grader = make_grader(f"{HERE}:{name}", options={"factor": 3.0})
    assert grader(PROBLEMS[:1], ["0.5"])[0].reward == 1.5


def test_an_option_that_is_no_argument_is_refused() -> None:
    assert refusal(ConfigError, lambda: make_grader(f"{HERE}:scaled", options={"fact": 3})) == (
        f"reward.grader: the options of {HERE}:scaled must be among its arguments (response, answer, metadata, "
        "factor), got fact; remove them"
    )
    assert refusal(ConfigError, lambda: make_grader(f"{HERE}:Scaled", options={"fact": 3})) == (
        f"reward.grader: the options of {HERE}:Scaled must be the arguments of its class, got {{'fact': 3}}: "
        "Scaled.__init__() got an unexpected keyword argument 'fact'; correct them in its options"
    )
