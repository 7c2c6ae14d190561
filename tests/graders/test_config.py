"""From the reward section of a config to the graders that run."""

from pathlib import Path
from typing import Any

import pytest

from distrl.config import make_config
from distrl.errors import ConfigError, StageError
from distrl.graders.build import build_graders, chosen_graders, describe, lowest_reward
from distrl.graders.config import GraderConfig
from distrl.graders.grade import Response
from distrl.tasks import Problem
from tests.builders import refusal, run

PROBLEM = Problem("prompt-0", "0>", "5")


def config(*overrides: str) -> Any:
    return make_config({"model": {"path": "model"}, "data": {"source": "sort_digits"}}, overrides).reward


def test_graders_are_named_weighted_and_given_options() -> None:
    reward = config(
        "reward.graders.numeric={}",
        "reward.graders.short={grader: overlong, weight: 0.5, options: {margin: 4, longest: 8}}",
    )
    graders = chosen_graders(reward.grader, reward.graders, "exact")
    assert describe(graders) == "1 numeric + 0.5 short"
    # numeric gives at least 0, overlong at least -1.
    assert lowest_reward(graders) == -0.5

    async def grade() -> Any:
        grader = build_graders(graders, concurrency=2)
        try:
            return await grader.grade([PROBLEM], [Response("5", "p0.0.0", tokens=6)])
        finally:
            grader.close()

    (found,) = run(grade())
    assert found.reward == 1.0 + 0.5 * -0.5
    assert found.components == {"numeric": 1.0, "short": -0.5}
    assert found.verdict == "correct"


def test_a_weight_below_zero_turns_the_range() -> None:
    graders = {"exact": GraderConfig(weight=-2.0), "numeric": GraderConfig(weight=1.0)}
    assert lowest_reward(graders) == -2.0


def test_a_function_of_ones_own_has_no_range_unless_one_is_given() -> None:
    name = "tests.graders.users_graders:plain"
    assert lowest_reward(chosen_graders(name, {}, "exact")) is None
    graders = {"plain": GraderConfig(grader=name, range=(0.0, 0.5))}
    assert lowest_reward(graders) == 0.0

    async def grade() -> None:
        await build_graders(graders, 1).grade([PROBLEM], [Response("5", "p0.0.1")])

    with pytest.raises(StageError) as caught:
        run(grade())
    assert str(caught.value) == (
        f"grader {name} failed on prompt prompt-0, rollout p0.0.1: reward must be from 0 to 0.5, got 1.0"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["reward.grader=exact", "reward.graders.numeric={}"],
            "reward.grader must be empty where reward.graders is set, got 'exact'; remove one of the two",
        ),
        (
            ["reward.graders.numeric.range=[1, 0]"],
            "reward.graders.numeric.range must go from the lowest to the highest reward, got [1.0, 0.0]; swap them",
        ),
        (["reward.graders.numeric.timeout_s=0"], "reward.graders.numeric.timeout_s must be greater than 0, got 0"),
    ],
)
def test_what_contradicts_itself_is_refused(overrides: list[str], message: str) -> None:
    assert refusal(ConfigError, lambda: config(*overrides)) == message


def test_options_that_do_not_suit_are_refused_before_a_run(tmp_path: Path) -> None:
    from deploy.check import check_graders
    from distrl.tasks import load_task

    loaded = make_config(
        {"model": {"path": "model"}, "data": {"source": "sort_digits"}},
        ["reward.graders.regex.options={patern: x}"],
    )
    assert refusal(ConfigError, lambda: check_graders(loaded, load_task(loaded.data))) == (
        "reward.graders.regex.grader: the options of regex must be the arguments of its class, got {'patern': 'x'}: "
        "Regex.__init__() got an unexpected keyword argument 'patern'; correct them in its options"
    )
