"""Rewards of length, and DAPO's overlong shaping against its formula."""

import pytest

from distrl.errors import ConfigError, StageError
from distrl.graders.grade import Response
from distrl.graders.length import Length, Overlong
from distrl.tasks import Problem
from tests.builders import refusal

PROBLEM = Problem("prompt-0", "0>", "5")


def response(tokens: int, longest: int = 0) -> Response:
    return Response("x", "p0.0.0", tokens, longest)


@pytest.mark.parametrize(
    ("tokens", "reward"),
    [
        # Longest 20, margin 4: free up to 16, then a quarter per token, never below -1.
        (1, 0.0),
        (16, 0.0),
        (17, -0.25),
        (18, -0.5),
        (20, -1.0),
        (21, -1.0),
        (100, -1.0),
    ],
)
def test_overlong_is_dapos_soft_punishment(tokens: int, reward: float) -> None:
    assert Overlong(margin=4, longest=20)([PROBLEM], [response(tokens)])[0].reward == reward
    assert Overlong(margin=4)([PROBLEM], [response(tokens, 20)])[0].reward == reward


def test_the_constants_of_the_paper() -> None:
    """L_max = 16384 + 4096 and L_cache = 4096: half the punishment in the middle of the margin."""
    (grade,) = Overlong(margin=4096, longest=20480)([PROBLEM], [response(16384 + 2048)])
    assert (grade.reward, grade.reason) == (-0.5, "18432 tokens of at most 20480")


def test_a_margin_beyond_the_length_is_a_failure() -> None:
    assert refusal(StageError, lambda: Overlong(margin=4)([PROBLEM], [response(2, 3)])) == (
        "grader overlong failed on prompt prompt-0, rollout p0.0.0: the longest length must be >= options.margin (4), "
        "got 3"
    )


def test_a_text_whose_tokens_nobody_counted_is_a_failure() -> None:
    assert refusal(StageError, lambda: Length()([PROBLEM], ["x"])) == (
        "grader length failed on prompt prompt-0: it needs the number of tokens, which only a run and eval count"
    )


@pytest.mark.parametrize(("tokens", "reward"), [(10, -1.0), (5, -0.5), (100, -2.0)])
def test_length_is_in_proportion_up_to_its_limit(tokens: int, reward: float) -> None:
    (grade,) = Length(per_token=-0.1, limit=2.0)([PROBLEM], [response(tokens)])
    assert grade.reward == pytest.approx(reward)
    assert grade.components["tokens"] == tokens


def test_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"options.limit of the grader length must be >= 0, got -1"):
        Length(limit=-1)
    with pytest.raises(ConfigError, match=r"options.margin must be >= 1"):
        Overlong(margin=0)
