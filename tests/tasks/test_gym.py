import json
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distrl.errors import ConfigError, DataError
from distrl.tasks import DataConfig, Problem, Task, load_task
from distrl.tasks.gym import pack, score, unpack

ONE_DIGIT_SUMS = {
    "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1,
    "operators": ["+"], "allow_parentheses": False, "allow_negation": False,
}  # fmt: skip


def _load(task: str = "basic_arithmetic", **values: Any) -> Task:
    sizes = {"train_size": 30, "heldout_size": 10}
    return load_task(DataConfig.model_validate({"source": "reasoning_gym", "task": task, **sizes, **values}))


def _train(task: Task) -> list[Problem]:
    return [task.train[i] for i in range(len(task.train))]


def _refused(kind: type[Exception], *args: Any, **values: Any) -> str:
    with pytest.raises(kind) as error:
        _load(*args, **values)
    return str(error.value)


def test_sizes_and_default_grader() -> None:
    task = _load()
    assert (len(task.train), len(task.heldout), task.default_reward) == (30, 10, "reasoning_gym")


def test_options_reach_the_task() -> None:
    # The answer is derived from the question: a sum of two digits.
    for problem in _train(_load(options=ONE_DIGIT_SUMS)):
        left, plus, right = problem.prompt.removeprefix("Calculate ").removesuffix(".").split()
        assert plus == "+"
        assert int(problem.answer) == int(left) + int(right)
        assert max(int(left), int(right)) <= 10


def test_no_held_out_question_is_trained_on_where_questions_are_few() -> None:
    # There are 11 x 11 such sums: unfiltered, 200 draws would miss 20 of them with probability (1 - 20/121)^200.
    task = _load(options=ONE_DIGIT_SUMS, train_size=200, heldout_size=20)
    heldout = {problem.prompt for problem in task.heldout}
    assert len(heldout) == 20
    assert not heldout & {problem.prompt for problem in _train(task)}
    assert len(task.train) == 200


def test_problems_are_a_function_of_the_data_seed() -> None:
    assert _load(seed=1) == _load(seed=1)
    # The package makes entry i from seed + i: neighboring seeds must not give shifted copies of one another.
    assert not {p.prompt for p in _train(_load(seed=1))} & {p.prompt for p in _train(_load(seed=2))}


def test_metadata_alone_scores_a_response_after_a_round_trip_through_json() -> None:
    for problem in _load("number_sorting").heldout:
        metadata = json.loads(json.dumps(problem.metadata))
        assert score(problem.answer, metadata) == 1.0
        assert score("['1']", metadata) == 0.0


def test_scorer_that_compares_tuples_still_finds_its_answer_after_json() -> None:
    # arc_1d and rearc hold their grids as tuples, which plain JSON turns into lists that are never equal to them.
    problem = _load("rearc", train_size=1, heldout_size=1).heldout[0]
    assert score(problem.answer, json.loads(json.dumps(problem.metadata))) == 1.0


def test_scorer_is_made_with_the_problems_options() -> None:
    metadata = dict(_load("number_sorting").heldout[0].metadata) | {"options": {"min_numbers": 0}}
    with pytest.raises(ConfigError) as error:
        score("['1']", metadata)
    assert str(error.value) == (
        "data.options must suit the task number_sorting, got {'min_numbers': 0} and 1 entries: "
        "min_numbers must be positive"
    )


def test_task_without_reference_answer_gives_an_empty_one() -> None:
    assert {p.answer for p in _load("propositional_logic").heldout} == {""}


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(
            st.text() | st.integers() | st.sampled_from(["__tuple__", "__items__"]) | st.tuples(st.text()), inner
        )
    ),
    max_leaves=20,
)


@given(json_like)
@example({"__tuple__": [1]})
@example({"__items__": [[1, 2]]})
def test_packed_values_survive_json_exactly(value: object) -> None:
    back = unpack(json.loads(json.dumps(pack(value))))
    # repr tells 1 from True and (1,) from [1].
    assert repr(back) == repr(value)


def test_value_that_json_cannot_carry_is_refused_with_the_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    from reasoning_gym.arithmetic.basic_arithmetic import BasicArithmeticDataset

    entry = {"question": "q", "answer": "a", "metadata": {"seen": {1}}}
    monkeypatch.setattr(BasicArithmeticDataset, "__getitem__", lambda self, index: entry)
    assert _refused(DataError) == (
        "data.task must have entries of plain values, got 'basic_arithmetic' whose entry 0 does not: a set cannot be "
        "packed as JSON; choose another task"
    )


def test_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert _refused(ConfigError) == (
        "data.source reasoning_gym needs the package reasoning-gym, which cannot be imported: import of reasoning_gym "
        "halted; None in sys.modules; install it with pip install 'distrl[reasoning-gym]'"
    )


def test_unknown_task_is_refused_with_close_names() -> None:
    from importlib.metadata import version

    assert _refused(ConfigError, "basic_arithmetik") == (
        f"data.task must be a task of reasoning-gym {version('reasoning-gym')}, got 'basic_arithmetik'; close to it "
        "are basic_arithmetic, bitwise_arithmetic, decimal_arithmetic"
    )


@pytest.mark.parametrize("key", ["max_term", "seed", "size"])
def test_unknown_option_is_refused_with_the_known_ones(key: str) -> None:
    # The seed and the size of the data are keys of their own.
    assert _refused(ConfigError, options={key: 3}) == (
        f"data.options.{key} is not an option of basic_arithmetic, got 3; its options are allow_negation, "
        "allow_parentheses, format_style, max_digits, max_terms, min_digits, min_terms, operators, whitespace"
    )


def test_option_that_the_task_rejects_is_refused_with_its_reason() -> None:
    assert _refused(ConfigError, options={"min_terms": 0}) == (
        "data.options must suit the task basic_arithmetic, got {'min_terms': 0} and 40 entries: "
        "min_terms must be positive"
    )


EIGHT_QUESTIONS = {"min_trials": 3, "max_trials": 3}
"""Of coin_flip: at least or exactly 0, 1, 2 or 3 heads in 3 flips."""


def test_more_held_out_questions_than_exist_are_refused() -> None:
    assert _refused(DataError, "coin_flip", options=EIGHT_QUESTIONS, heldout_size=20) == (
        "data.heldout_size must be at most the number of different questions, got 20 but coin_flip gave only 8 in 80 "
        "draws; lower it or widen the task by data.options"
    )


def test_held_out_questions_that_leave_none_to_train_on_are_refused() -> None:
    assert _refused(DataError, "coin_flip", options=EIGHT_QUESTIONS, heldout_size=8, train_size=5) == (
        "data.train_size must be at most the number of questions that are not held out, got 5 but coin_flip gave "
        "only 0 in 20 draws; lower data.heldout_size or widen the task by data.options"
    )
