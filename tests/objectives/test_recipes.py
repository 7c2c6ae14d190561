"""Recipes: what they read, what they refuse and how they say it."""

import pickle

import pytest
import torch
from torch import Tensor

from distrl.errors import ConfigError, SchemaError
from distrl.objectives import (
    Batch,
    build,
    check,
    compute,
    evaluate,
    options,
    prepare,
    recipe_names,
    required_columns,
)
from distrl.objectives.build import parse
from distrl.objectives.ratios import Ratio
from distrl.objectives.tapers import Truncate
from tests.objectives.tabular import close


def tensors() -> dict[str, Tensor]:
    names = ("logps", "behavior_logps", "ref_logps")
    return {
        "mask": torch.ones(4, 3, dtype=torch.bool),
        "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0]),
        "group": torch.tensor([0, 0, 1, 1]),
        **{name: torch.zeros(4, 3) for name in names},
    }


def message(error: pytest.ExceptionInfo[Exception]) -> str:
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    return str(error.value)


def test_the_recipes_that_are_there() -> None:
    assert recipe_names() == (
        *(
            "a_star_po",
            "cispo",
            "dapo",
            "decoupled_ppo",
            "dr_grpo",
            "grpo",
            "gspo",
            "icepop",
            "is",
            "nash_md",
            "nash_mp",
        ),
        *("online_ipo", "ppo", "reinforce", "reinforce_pp", "rloo", "rpg", "tis", "topr"),
    )


@pytest.mark.parametrize("name", recipe_names())
def test_every_option_has_a_default_that_its_rule_accepts_and_a_help(name: str) -> None:
    recipe = build(name)
    assert dict(recipe.options) == {option: rule.default for option, rule in options(name).items()}
    assert all(rule.help for rule in options(name).values())


def test_the_reference_is_needed_only_with_a_kl() -> None:
    topr = {"policy", "behavior", "rewards"}
    assert required_columns(build("topr")) == topr
    assert required_columns(build("topr", kl_coefficient=0.1)) == topr | {"reference"}
    assert required_columns(build("grpo", kl_coefficient=0.0)) == topr | {"group"}
    assert required_columns(build("grpo")) == topr | {"group", "reference"}


def test_a_recipe_by_name_has_its_defaults() -> None:
    close(compute("grpo", tensors()).loss, compute(build("grpo"), tensors()).loss)


@pytest.mark.parametrize(
    ("name", "chosen", "text"),
    [
        (
            "ppo2",
            {},
            f"objective.recipe must be the name of a recipe, got 'ppo2'; the recipes are {', '.join(recipe_names())}",
        ),
        (
            "grpo",
            {"beta": 0.04},
            "grpo.beta is not an option of the recipe grpo, got 0.04; "
            "its options are clip_high, clip_low, epsilon, "
            "kl_coefficient, kl_estimator, kl_rows, kl_top_k, max_log_ratio",
        ),
        (
            "topr",
            {"kl_coefficient": -1.0},
            "topr.kl_coefficient must be >= 0.0, got -1.0; "
            "the default is 0.0 (strength of the KL to the reference; 0 leaves it out)",
        ),
        (
            "topr",
            {"baseline": "mean"},
            "topr.baseline must be a number, got 'mean'; the default is 0.5 "
            "(subtracted from the reward; 0.5 suits rewards in {0, 1}, 0 rewards in {-1, 1})",
        ),
    ],
)
def test_a_wrong_recipe_or_option_is_refused(name: str, chosen: dict[str, float | str], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(name, **chosen)
    assert message(error) == text


DOCUMENT: dict[str, object] = {
    "source": "a test",
    "status": "reconstruction",
    "proves": "potential",
    "credit": {"baseline": {"constant": {"value": "$baseline"}}},
    "terms": [{"name": "policy", "loss": "score"}],
}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"credit": {"scale": "median"}},
            "mine.credit.scale must be one scale by name, got 'median'; known: batch_std, group_std, one",
        ),
        (
            {"credit": {"base": "one"}},
            "mine.credit.base is not known, got 'one'; "
            "known here: rewards, returns, baseline, scale, scale_includes_kl",
        ),
        (
            {"terms": [{"name": "policy", "loss": "score", "per": "batch"}]},
            "mine.terms[0].per must be one of token, sequence_mean, sequence_sum, got 'batch'; choose one of them",
        ),
        (
            {"terms": [{"name": "policy", "loss": "score", "coefficient": {"fixed": {"value": "high"}}}]},
            "mine.terms[0].coefficient.fixed.value must be a float, got 'high'; correct the recipe file",
        ),
        (
            {"terms": [{"loss": "score"}]},
            "mine.terms[0].name must be given, got nothing; "
            "known here: name, loss, weights, where, per, divisor, "
            "coefficient, self_normalize",
        ),
        ({"terms": []}, "mine.terms must have at least one term, got none; add one with loss: score"),
        (
            {"credit": {"baseline": {"constant": {"value": "$c"}}}},
            "mine refers to the option c, which mine lacks; declare it under options",
        ),
    ],
)
def test_a_wrong_recipe_file_is_refused(change: dict[str, object], text: str) -> None:
    parse("mine", DOCUMENT, {"baseline": 0.0})
    with pytest.raises(ConfigError) as error:
        parse("mine", {**DOCUMENT, **change}, {"baseline": 0.0})
    assert message(error) == text


def test_the_parts_of_a_recipe_file_may_be_nested() -> None:
    ratio = {"ratio": {"shape": {"truncate": {"low": 0, "high": 2}}, "level": "prefix", "over": {"proximal": 1.0}}}
    recipe = parse(
        "mine",
        {**DOCUMENT, "terms": [{"name": "policy", "loss": "score", "weights": [ratio]}]},
        {"baseline": 0.0},
    )
    assert recipe.terms[0].weights == (Ratio(Truncate(0.0, 2.0), "prefix", {"policy": 1.0}, {"proximal": 1.0}),)


def test_topr_without_negative_credits_is_refused() -> None:
    check(build("topr"), lowest_reward=0.0)
    check(build("topr", baseline=0.0), lowest_reward=-1.0)
    check(build("topr", baseline=0.0, a_plus=0.0), lowest_reward=0.0)  # importance sampling of good responses: not SFT
    with pytest.raises(ConfigError) as error:
        check(build("topr", baseline=0.0), lowest_reward=0.0)
    assert message(error) == (
        "topr.baseline must be > the lowest reward 0.0, got 0.0; "
        "else no response is pushed down (supervised training on the others): "
        "use 0.5 for rewards in {0, 1}, or rewards in {-1, 1} with baseline 0"
    )


def test_grpo_with_groups_of_one_is_refused() -> None:
    check(build("grpo"), group_size=2)
    check(build("topr"), group_size=1)
    with pytest.raises(ConfigError) as error:
        check(build("grpo"), group_size=1)
    assert message(error) == (
        "grpo needs a group size >= 2, got 1; "
        "a response alone in its group is its own mean and has credit 0: sample more responses per prompt"
    )


def test_a_run_that_does_not_score_the_reference_cannot_have_a_kl() -> None:
    produced = frozenset({"policy", "behavior", "rewards", "group"})
    check(build("grpo", kl_coefficient=0.0), produced=produced)
    with pytest.raises(ConfigError) as error:
        check(build("grpo", kl_coefficient=0.04), produced=produced)
    assert message(error) == (
        "grpo reads reference (from the reference scorer), which this run does not produce; "
        "turn on what produces it, or the option off that reads it (kl_coefficient: 0 for the reference)"
    )


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        (
            "logps",
            "grpo needs the tensor logps ([B, T]), got behavior_logps, group, mask, ref_logps, rewards; ",
        ),
        (
            "behavior_logps",
            "grpo needs the tensor behavior_logps ([B, T]), got group, logps, mask, ref_logps, rewards; ",
        ),
        (
            "ref_logps",
            "grpo needs the tensor ref_logps ([B, T]), got behavior_logps, group, logps, mask, rewards; ",
        ),
        (
            "rewards",
            "grpo needs the tensor rewards ([B] or [B, T]), got behavior_logps, group, logps, mask, ref_logps; ",
        ),
        (
            "group",
            "grpo needs the tensor group ([B] int), got behavior_logps, logps, mask, ref_logps, rewards; ",
        ),
    ],
)
def test_a_missing_tensor_is_named(missing: str, text: str) -> None:
    with pytest.raises(SchemaError) as error:
        compute(build("grpo", kl_coefficient=0.04), {k: v for k, v in tensors().items() if k != missing})
    assert message(error) == text + "required_columns(recipe) lists what a recipe reads"


def test_a_missing_mask_is_named() -> None:
    with pytest.raises(SchemaError) as error:
        compute("topr", {"logps": torch.zeros(4, 3)})
    assert message(error) == (
        "topr needs the tensor mask ([B, T] bool, True where the policy chose the token), got logps; "
        "pass loss_mask of the rollouts as mask"
    )


@pytest.mark.parametrize(
    ("name", "tensor", "wanted", "kind"),
    [
        ("logps", torch.zeros(4, 2), "[4, 3]", "float32 [4, 2]"),
        ("behavior_logps", torch.zeros(3, 4), "[4, 3]", "float32 [3, 4]"),
        ("ref_logps", torch.zeros(4), "[4, 3]", "float32 [4]"),
        ("rewards", torch.zeros(5), "[4] or [4, 3]", "float32 [5]"),
        ("group", torch.zeros(4, 3, dtype=torch.int64), "[4]", "int64 [4, 3]"),
    ],
)
def test_a_misshapen_tensor_is_named(name: str, tensor: Tensor, wanted: str, kind: str) -> None:
    with pytest.raises(SchemaError) as error:
        compute("topr", {**tensors(), name: tensor})
    assert message(error) == (
        f"topr needs the tensor {name} of shape {wanted}, got {kind}; "
        "the mask has shape [4, 3], and every tensor has its rows in the same order"
    )


def test_a_mask_of_numbers_is_refused() -> None:
    with pytest.raises(SchemaError) as error:
        compute("topr", {**tensors(), "mask": torch.ones(4, 3)})
    assert message(error) == (
        "topr needs the tensor mask as bool of shape [B, T] with B, T >= 1, got float32 [4, 3]; "
        "convert it with mask.bool()"
    )


def test_rows_that_would_lose_a_learnable_token_are_refused() -> None:
    batch = Batch.from_tensors(tensors(), recipe="topr")
    plan = prepare(build("topr"), batch)
    text = (
        "rows cut to 2 positions would lose a learnable token at position 2; "
        "pad the micro-batch to at least 3 positions"
    )
    with pytest.raises(SchemaError) as error:
        batch.rows(torch.tensor([0]), torch.zeros(1, 2))
    assert message(error) == text
    with pytest.raises(SchemaError) as error:
        plan.rows(torch.tensor([0]), 2)
    assert message(error) == text


def test_a_plan_of_other_rows_is_refused() -> None:
    batch = Batch.from_tensors(tensors(), recipe="topr")
    plan = prepare(build("topr"), batch)
    with pytest.raises(SchemaError) as error:
        evaluate(build("topr"), batch.rows(torch.tensor([0, 1])), plan)
    assert message(error) == (
        "topr needs a plan of the same rows, of shape [2, 3] like the mask, got [4, 3]; "
        "pass plan.rows(index, width) with the index of batch.rows"
    )
