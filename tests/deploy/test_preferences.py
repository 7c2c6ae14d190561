"""What a run that compares responses needs, before it starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.check import check_run
from deploy.explain import explain
from distrl.config import Config, make_config
from distrl.errors import ConfigError
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.schema import Role
from distrl.tokenizer import character_tokenizer
from tests.builders import refusal


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    size = TinyArchitecture(hidden_size=16, layers=1, heads=2, intermediate_size=16, context_length=16)
    make_tiny_model(directory, character_tokenizer("0123456789>"), seed=0, architecture=size)
    return directory


def config(model: Path, recipe: str, **changes: Any) -> Config:
    values = {
        "model": {"path": str(model)},
        "data": {"source": "sort_digits", "heldout_size": 4, "options": {"digits": 4}},
        "rollout": {"group_size": 4, "max_new_tokens": 6},
        "objective": {"recipe": recipe},
        "preference": {"function": "reward_difference"},
        "evaluation": {"problems": 4},
    }
    return make_config(values, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def test_nash_mp_samples_opponents_and_online_ipo_compares_its_own_pairs(model: Path) -> None:
    settings = config(model, "nash_mp", **{"preference.opponents": 2})
    plan = check_run(settings)
    assert plan.opponents == 2
    assert Role.OPPONENT in plan.samples
    assert (
        "reward_difference compares responses with 2 opponent(s) each: moving average of the policy's weights, 0.01 of "
        "the new ones after every step"
    ) in "\n".join(explain(settings, plan))
    pairs = check_run(config(model, "online_ipo", **{"train.max_staleness": 0}))
    assert pairs.opponents == 0
    assert Role.OPPONENT not in pairs.samples


def test_nash_md_reads_the_reference_for_its_opponents_also_without_a_kl(model: Path) -> None:
    given = {"reference.path": str(model)}
    mixed = check_run(config(model, "nash_md", **given, **{"objective.options": {"tau": 0.0, "mixture": 0.25}}))
    assert Role.OPPONENT in mixed.samples
    assert not mixed.scores_reference
    nobody = {"tau": 0.0, "mixture": 0.0}
    assert refusal(
        ConfigError, lambda: check_run(config(model, "nash_md", **given, **{"objective.options": nobody}))
    ).startswith("reference.path must be empty for objective.recipe nash_md as configured")


def test_a_moving_reference_is_scored_by_the_learner_and_not_by_actors(model: Path) -> None:
    nobody = {"preference.function": None}
    options = {"kl_coefficient": 0.01, "reference": "reset"}
    assert not check_run(config(model, "dapo", **nobody, **{"objective.options": options})).scores_reference
    options["reference"] = "frozen"
    assert check_run(config(model, "dapo", **nobody, **{"objective.options": options})).scores_reference


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (
            "reinforce",
            {},
            "preference.function must be empty for objective.recipe reinforce, got 'reward_difference'; nothing reads "
            "preferences: remove it, or choose the recipe nash_mp or online_ipo",
        ),
        (
            "nash_mp",
            {"preference.function": None},
            "preference.function is required for objective.recipe nash_mp, which compares responses; set it to "
            "reward_difference, a judge, or module:function",
        ),
        (
            "nash_mp",
            {"preference.options": {"path": "rm"}},
            "preference.options must be left out with preference.function reward_difference, got {'path': 'rm'}; a "
            "difference of rewards takes none",
        ),
        (
            "nash_mp",
            {"preference.symmetrize": True},
            "preference.symmetrize must be left out with preference.function reward_difference, got True; a difference "
            "of rewards takes none",
        ),
        (
            "nash_mp",
            {"preference.parallel": 2},
            "preference.parallel must be left out with preference.function reward_difference, got 2; a difference of "
            "rewards takes none",
        ),
        (
            "nash_mp",
            {"preference.function": "tests.test_preferences:longer", "preference.scale": 2.0},
            "preference.scale must be left out with preference.function tests.test_preferences:longer, got 2.0; only "
            "reward_difference is scaled",
        ),
        (
            "nash_mp",
            {
                "preference.function": "judge",
                "preference.options": {"url": "http://localhost:8000/v1", "model": "m"},
                "preference.scale": 0.5,
            },
            "preference.scale must be left out with preference.function judge, got 0.5; only reward_difference is "
            "scaled",
        ),
        (
            "nash_mp",
            {"preference.function": "judge", "preference.options": {"url": "http://localhost:8000/v1"}},
            "preference.function: the options of judge must be its arguments, got {'url': 'http://localhost:8000/v1'}: "
            "missing a required argument: 'model'; correct them in preference.options",
        ),
        (
            "nash_mp",
            {"preference.opponents": 5},
            "preference.opponents must be <= rollout.group_size (4), got 5; a ticket has as many opponents as "
            "responses",
        ),
        (
            "nash_md",
            {"generation.engine": "vllm"},
            "generation.engine must be transformers for objective.recipe nash_md, whose opponent samples from "
            "policy^0.875 reference^0.125, mixed token by token, got vllm; a vLLM samples from one model alone: change "
            "the engine, or use nash_mp, whose opponents are an average or a snapshot of the policy's weights",
        ),
        (
            "online_ipo",
            {"train.max_staleness": 0, "rollout.group_size": 3},
            "rollout.group_size must be even for objective.recipe online_ipo, got 3; the responses of a ticket are "
            "compared in pairs",
        ),
        (
            "online_ipo",
            {"train.max_staleness": 2},
            "train.max_staleness must be 0 and train.on_stale wait for objective.recipe online_ipo, got 2 and wait; "
            "both responses of a pair play for the policy itself, and older ones would make older weights the opponent",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    model: Path, recipe: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.check.find_spec", lambda name: name)  # as if vLLM were installed
    assert refusal(ConfigError, lambda: check_run(config(model, recipe, **changes))) == message
