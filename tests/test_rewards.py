import json
import math
import pickle
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrl.errors import ConfigError, StageError
from distrl.graders.registry import BUILT_IN
from distrl.rewards import Grade, exact, make_grader, numeric, reasoning_gym
from distrl.tasks import DataConfig, Problem, load_task


def test_exact_ignores_whitespace_at_the_ends_only() -> None:
    assert exact(" 1 2\n", "1 2", {}) == Grade(1.0, {"exact": 1.0}, "correct")
    assert exact("12", "1 2", {}) == Grade(0.0, {"exact": 0.0}, "wrong")
    assert exact("", "", {}).verdict == "correct"


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("42", "42"),
        ("The answer is 42.", "42"),
        ("3 apples and 4 pears make 7 fruits", "7"),
        ("1,234", "1234"),
        ("$1,234,567.50 in total", "1234567.5"),
        ("-5", "-5"),
        ("+5", "5"),
        ("x=-4", "-4"),
        ("(-4)", "-4"),
        ("\N{MINUS SIGN}4", "-4"),
        ("10-4", "4"),
        ("(3)-4", "4"),
        ("covid-19", "19"),
        ("- 4", "4"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("2.50", "2.5"),
        ("007", "7"),
        ("1e3", "1000"),
        ("2.5E-1", "0.25"),
        ("50%", "50"),
        ("\\boxed{42}", "42"),
        ("1,23", "23"),
        ("12,3456", "3456"),
        ("1, 2, 3", "3"),
        ("1/2", "2"),
        ("version 1.2.3", "3"),
        ("it is 5 #### 42", "42"),
        ("#### 42 apples, 6 * 7", "42"),
        ("#### 1\n#### 2", "2"),
        ("1" * 5000, "1" * 5000),
        ("1e99999", "99999"),
    ],
)
def test_number_of_a_response(response: str, number: str) -> None:
    assert numeric(response, number, {}) == Grade(1.0, {"numeric": 1.0}, "correct")
    # Nothing else is accepted for it, not even the number beside it.
    assert numeric(response, str(Decimal(number[:50]) + 1), {}).verdict == "wrong"


def test_wrong_number_says_what_was_read() -> None:
    assert numeric("It is 1,235.", "#### 1234", {}) == Grade(0.0, {"numeric": 0.0}, "wrong", "got 1235, want 1234")


@pytest.mark.parametrize("response", ["", "no idea", "5 #### none"])
def test_response_without_a_number_is_wrong(response: str) -> None:
    assert numeric(response, "5", {}) == Grade(0.0, {"numeric": 0.0}, "wrong", "no number in the response")


def test_numbers_are_compared_exactly() -> None:
    # In floating point these would be equal.
    assert numeric("10000000000000000000000000001", "10000000000000000000000000000", {}).verdict == "wrong"
    assert numeric("0.1", "0.1000000000000000055511151231257827", {}).verdict == "wrong"


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_every_way_to_write_a_number_is_understood(number: Decimal) -> None:
    for text in (f"{number}", f"{number:,}", f"so {number}.", f"#### {number} (of 7)", f"{number}0"):
        assert numeric(text, str(number), {}).verdict == "correct"


@given(st.text(alphabet="0123456789.,-+eE#$% x()", max_size=40))
def test_no_response_makes_the_numeric_grader_fail(response: str) -> None:
    assert numeric(response, "5", {}).verdict in ("correct", "wrong")


@pytest.mark.parametrize("answer", ["", "yes", "1/2", "1 or 2", "#### none"])
def test_answer_that_is_not_one_number_is_a_failure(answer: str) -> None:
    grade = numeric("5", answer, {})
    assert math.isnan(grade.reward)
    assert (grade.verdict, grade.reason) == ("failed", f"answer must be one number, got {answer!r}")


def _problem(answer: str = "5", metadata: Mapping[str, object] | None = None) -> Problem:
    return Problem.of("prompt", answer, metadata)


def test_grader_grades_row_by_row() -> None:
    problems = [_problem("1"), _problem("2"), _problem("3")]
    assert [g.reward for g in make_grader("exact")(problems, ["1", "3", "3"])] == [1.0, 0.0, 1.0]
    assert [g.reward for g in make_grader("numeric")(problems, ["1.0", "two", "#### 3"])] == [1.0, 0.0, 1.0]


def test_different_numbers_of_problems_and_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        make_grader("exact")([_problem(), _problem()], ["5"])


def raises(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    raise KeyError("solution")


def returns_nan(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    return Grade(math.nan, verdict="correct")


def returns_infinite_component(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    return Grade(1.0, {"style": math.inf}, "correct")


def returns_no_number(response: str, answer: str, metadata: Mapping[str, object]) -> Any:
    return Grade("1", verdict="correct")  # type: ignore[arg-type]


def returns_text(response: str, answer: str, metadata: Mapping[str, object]) -> Any:
    return "1.0"


def returns_nan_float(response: str, answer: str, metadata: Mapping[str, object]) -> float:
    return math.nan


def returns_nothing(response: str, answer: str, metadata: Mapping[str, object]) -> Any:
    return None


def returns_unknown_verdict(response: str, answer: str, metadata: Mapping[str, object]) -> Any:
    return Grade(1.0, verdict="right")  # type: ignore[arg-type]


def gives_up(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    return Grade(math.nan, verdict="failed", reason="the sandbox is full")


FAILURES = [
    ("raises", "KeyError: 'solution'"),
    ("returns_nan", "reward must be a finite number, got nan"),
    ("returns_infinite_component", "style must be a finite number, got inf"),
    ("returns_no_number", "reward must be a finite number, got '1'"),
    ("returns_text", "it must give a Grade or a number, got '1.0'"),
    ("returns_nan_float", "reward must be a finite number, got nan"),
    ("returns_nothing", "it must give a Grade or a number, got None"),
    ("returns_unknown_verdict", "verdict must be one of correct, wrong, failed, got 'right'"),
    ("gives_up", "the sandbox is full"),
]


def half(response: str, answer: str, metadata: Mapping[str, object]) -> float:
    return len(response) / len(answer)


@pytest.fixture
def graders(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which the graders of this file can be imported."""
    import sys
    from types import ModuleType

    module = ModuleType("graders_of_a_user")
    for name, _ in FAILURES:
        setattr(module, name, globals()[name])
    module.half = half  # type: ignore[attr-defined]
    module.exact = exact  # type: ignore[attr-defined]
    module.number = 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


@pytest.mark.parametrize(("name", "reason"), FAILURES)
def test_failure_is_an_error_with_grader_and_prompt_never_a_zero_reward(graders: str, name: str, reason: str) -> None:
    problem = _problem()
    with pytest.raises(StageError) as error:
        make_grader(f"{graders}:{name}")([problem], ["5"])
    assert str(error.value) == f"grader {graders}:{name} failed on prompt {problem.prompt_id}: {reason}"
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_a_users_function_is_a_grader(graders: str) -> None:
    assert make_grader(f"{graders}:exact")([_problem()], ["5"]) == [Grade(1.0, {"exact": 1.0}, "correct")]


def test_a_bare_reward_is_correct_from_one_on(graders: str) -> None:
    grades = make_grader(f"{graders}:half")([_problem("22")] * 4, ["", "2", "22", "222"])
    assert [(g.reward, g.verdict) for g in grades] == [(0, "wrong"), (0.5, "wrong"), (1, "correct"), (1.5, "correct")]
    assert grades[1].components == {"half": 0.5}


def test_unknown_grader_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as error:
        make_grader("exakt")
    assert str(error.value) == (
        f"reward.grader must be one of {', '.join(BUILT_IN)} or module:function, got 'exakt'; "
        "name the function as my_package.my_module:my_grader"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_package:f", "No module named 'no_such_package'"),
        ("graders_of_a_user:f", "module 'graders_of_a_user' has no attribute 'f'"),
        (":f", "Empty module name"),
    ],
)
def test_function_that_cannot_be_imported_is_refused(graders: str, name: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_grader(name)
    assert str(error.value) == (
        f"reward.grader must name a function that can be imported, got {name!r}: {reason}; check the name and that "
        "its package is installed"
    )


def test_name_of_something_else_than_a_function_is_refused(graders: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_grader(f"{graders}:number", setting="reward.graders.0")
    assert str(error.value) == (
        "reward.graders.0 must name a function, got 'graders_of_a_user:number', which is of type int"
    )


def _gym_problem() -> Problem:
    config = DataConfig(source="reasoning_gym", task="number_sorting", train_size=1, heldout_size=1)
    return load_task(config).heldout[0]


def test_reasoning_gym_scores_from_metadata_that_went_through_json() -> None:
    problem = _gym_problem()
    metadata = json.loads(json.dumps(problem.metadata))
    # The scorer reads the metadata's entry: the answer that is passed beside it plays no part.
    assert reasoning_gym(problem.answer, "", metadata) == Grade(1.0, {"reasoning_gym": 1.0}, "correct")
    assert reasoning_gym("['1', '2']", "", metadata) == Grade(0.0, {"reasoning_gym": 0.0}, "wrong")


def test_reasoning_gym_reads_the_last_answer_tag_or_else_everything() -> None:
    problem = _gym_problem()
    right, wrong = f"<answer>\n{problem.answer} </answer>", "<answer>['1']</answer>"
    for response, reward in ((f"Well, {wrong} {right}.", 1.0), (f"{right}{wrong}", 0.0), (f" {problem.answer}\n", 1.0)):
        assert reasoning_gym(response, "", problem.metadata).reward == reward


def test_reasoning_gym_keeps_partial_scores_which_are_not_correct() -> None:
    # basic_arithmetic scores an answer inside a longer text by its share of the text's length.
    config = DataConfig(source="reasoning_gym", task="basic_arithmetic", train_size=1, heldout_size=1)
    problem = load_task(config).heldout[0]
    twice_as_long = problem.answer + "x" * len(problem.answer)
    assert reasoning_gym(twice_as_long, "", problem.metadata) == Grade(0.5, {"reasoning_gym": 0.5}, "wrong")


def test_reasoning_gym_on_another_sources_problem_is_a_failure() -> None:
    problem = _problem()
    with pytest.raises(StageError) as error:
        make_grader("reasoning_gym")([problem], ["5"])
    assert str(error.value) == f"grader reasoning_gym failed on prompt {problem.prompt_id}: KeyError: 'task'"


def test_grades_survive_pickling() -> None:
    grade = numeric("4", "5", {})
    assert pickle.loads(pickle.dumps(grade)) == grade
