"""Preferences: antisymmetric, in [0, 1], and never of a rollout with itself."""

import math
from collections.abc import Callable, Mapping

import pytest

from distrl.config_sections import PreferenceConfig
from distrl.errors import ConfigError, StageError
from distrl.judges import FunctionJudge
from distrl.preferences import Comparison, Contestant, make_comparison
from distrl.tasks import Problem
from tests.builders import refusal

PROBLEM = Problem.of("question", "answer")
FIRST, SECOND = Contestant("p0.0.0", "long one"), Contestant("o0.0.0", "short")
WHERE = f"preference mine on prompt {PROBLEM.prompt_id}"


def longer(first: str, second: str, answer: str, metadata: Mapping[str, object]) -> float:
    assert answer == "answer"
    return 0.8 if len(first) > len(second) else 0.2


def judge(prefer: Callable[[str, str, str, Mapping[str, object]], float], symmetrize: bool = False) -> Comparison:
    return Comparison("mine", FunctionJudge(prefer), symmetrize, 1.0)


def test_a_preference_is_that_of_the_function_and_one_half_for_equal_texts() -> None:
    assert judge(longer).compare(PROBLEM, FIRST, SECOND).probability == pytest.approx(0.8)
    assert judge(longer).compare(PROBLEM, SECOND, FIRST).probability == pytest.approx(0.2)
    assert judge(longer).compare(PROBLEM, FIRST, Contestant("o0.0.1", FIRST.text)).probability == 0.5


def test_a_rollout_is_never_compared_with_itself() -> None:
    assert refusal(StageError, lambda: judge(longer).compare(PROBLEM, FIRST, FIRST)) == (
        f"{WHERE}: rollout p0.0.0 must not be compared with itself"
    )


def test_a_function_that_is_not_antisymmetric_is_refused_unless_both_positions_are_asked_for() -> None:
    def likes_the_first(first: str, second: str, answer: str, metadata: Mapping[str, object]) -> float:
        return min(1.0, longer(first, second, answer, metadata) + 0.1)

    assert refusal(StageError, lambda: judge(likes_the_first).compare(PROBLEM, FIRST, SECOND)) == (
        f"{WHERE}: P(first beats second) + P(second beats first) must be 1, got 0.9 + 0.3 for rollouts p0.0.0 and "
        "o0.0.0; mend the function, or set preference.symmetrize to take the mean of both positions"
    )
    # (0.9 + 1 - 0.3) / 2: the bias for the first position is gone.
    assert judge(likes_the_first, symmetrize=True).compare(PROBLEM, FIRST, SECOND).probability == pytest.approx(0.8)


@pytest.mark.parametrize(("value", "shown"), [(1.5, "1.5"), (-0.1, "-0.1"), (math.nan, "nan")])
def test_a_function_that_leaves_the_interval_is_refused(value: float, shown: str) -> None:
    assert refusal(StageError, lambda: judge(lambda *_: value).compare(PROBLEM, FIRST, SECOND)) == (
        f"{WHERE}, rollouts p0.0.0 and o0.0.0: it must be a probability in [0, 1], got {shown}"
    )


def test_a_function_that_raises_is_named_with_its_cause() -> None:
    def broken(*_: object) -> float:
        raise KeyError("no")

    assert refusal(StageError, lambda: judge(broken).compare(PROBLEM, FIRST, SECOND)) == (
        f"{WHERE}, rollouts p0.0.0 and o0.0.0: KeyError: 'no'"
    )


def test_the_difference_of_rewards_is_the_model_of_bradley_and_terry() -> None:
    made = make_comparison(PreferenceConfig(function="reward_difference", scale=2.0))
    better, worse = Contestant("p0.0.0", "same", 3.0), Contestant("o0.0.0", "same", 1.0)
    assert made.compare(PROBLEM, better, worse).probability == pytest.approx(1 / (1 + math.exp(-1.0)))
    there, back = made.compare(PROBLEM, better, worse), made.compare(PROBLEM, worse, better)
    assert there.probability + back.probability == pytest.approx(1.0)
    far = Contestant("p0.0.0", "same", -1e9)
    assert made.compare(PROBLEM, far, worse).probability == pytest.approx(0.0)


def test_a_name_without_a_module_is_refused() -> None:
    assert refusal(ConfigError, lambda: make_comparison(PreferenceConfig(function="longer"))) == (
        "preference.function must be reward_difference, preference_model, judge, served_judge or module:function, got "
        "'longer'; name the function"
    )
    found = make_comparison(PreferenceConfig(function="tests.test_preferences:longer"))
    assert found.compare(PROBLEM, FIRST, SECOND).probability == pytest.approx(0.8)


class Tilted:
    """A judge of a user's as a class: prefers what is longer by `strength`, and what it reads first by a tenth."""

    version = "1"

    def __init__(self, strength: float) -> None:
        self._strength = strength

    def prefer(self, problem: Problem, first: str, second: str) -> float:
        return 0.6 + (self._strength if len(first) > len(second) else -self._strength)


def test_a_class_is_a_judge_with_the_options_as_its_arguments() -> None:
    config = PreferenceConfig(
        function="tests.test_preferences:Tilted", options={"strength": 0.3}, symmetrize=True, parallel=3
    )
    made = make_comparison(config)
    pairs = [(FIRST, SECOND), (SECOND, FIRST), (FIRST, Contestant("o0.0.1", FIRST.text))]
    found = made.compare_all(PROBLEM, pairs)
    # 0.9 read first and 1 - 0.3 read second; the order of the pairs is kept.
    assert [one.probability for one in found] == pytest.approx([0.8, 0.2, 0.5])
    assert [one.disagreement for one in found] == pytest.approx([0.2, 0.2, 0.0])


@pytest.mark.parametrize(
    ("function", "options", "cause"),
    [
        ("tests.test_preferences:Tilted", {}, "missing a required argument: 'strength'"),
        ("tests.test_preferences:longer", {"metadata": 1}, "multiple values for argument 'metadata'"),
        (
            "judge",
            {"url": "http://127.0.0.1:1", "model": "m", "opponents": 2},
            "got an unexpected keyword argument 'opponents'",
        ),
        ("preference_model", {}, "missing a required argument: 'path'"),
    ],
)
def test_options_that_do_not_suit_the_judge_are_refused(function: str, options: dict[str, object], cause: str) -> None:
    config = PreferenceConfig(function=function, options=options)
    assert refusal(ConfigError, lambda: make_comparison(config)) == (
        f"preference.function: the options of {function} must be its arguments, got {options!r}: {cause}; correct them "
        "in preference.options"
    )
