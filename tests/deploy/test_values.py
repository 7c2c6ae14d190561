"""Which table of values a run may train with, and which correction stale data needs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.check import check_graders, check_run
from deploy.explain import explain
from deploy.remote.coordinator import make_prompts
from deploy.values import estimate, table_key, training_prompts
from distrl.config import Config, make_config
from distrl.errors import ConfigError
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks import load_task
from distrl.tokenizer import character_tokenizer
from distrl.values_table import PromptRewards, TableKey, read_table, write_table
from tests.builders import refusal

PROMPTS = 20


def make_model(directory: Path, seed: int) -> Path:
    size = TinyArchitecture(hidden_size=16, layers=1, heads=2, intermediate_size=16, context_length=16)
    make_tiny_model(directory, character_tokenizer("0123456789>"), seed=seed, architecture=size)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    return make_model(directory, 0)


def config(model: Path, directory: Path, **changes: Any) -> Config:
    values = {
        "run": {"dir": str(directory)},
        "model": {"path": str(model)},
        "data": {"source": "sort_digits", "heldout_size": 4, "train_size": PROMPTS, "options": {"digits": 4}},
        "rollout": {"group_size": 1, "max_new_tokens": 6},
        "objective": {"recipe": "a_star_po", "options": {"importance": "sequence"}},
        "vstar": {"path": str(directory / "values.parquet"), "responses": 4},
        "evaluation": {"problems": 4},
    }
    return make_config(values, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def key_of(settings: Config) -> TableKey:
    return table_key(settings, check_graders(settings, load_task(settings.data)))


def write(settings: Config, solved: int = 5) -> None:
    """A table for the config, in which the reference solves the first `solved` prompts once."""
    prompts = training_prompts(settings, load_task(settings.data))
    rows = [
        PromptRewards(p.sha256, p.problem.prompt_id, (float(i < solved), 0.0, 0.0, 0.0), int(i < solved), 20)
        for i, p in enumerate(prompts)
    ]
    assert settings.vstar.path is not None
    values = [row.correct / 8 for row in rows]
    write_table(settings.vstar.path, key_of(settings), estimate(settings), rows, values)


def test_a_run_takes_its_values_from_the_table(model: Path, tmp_path: Path) -> None:
    settings = config(model, tmp_path)
    write(settings)
    plan = check_run(settings)
    task = load_task(settings.data)
    assert plan.values.by_prompt == {task.train[i].prompt_id: (i < 5) / 8 for i in range(PROMPTS)}
    assert make_prompts(settings, frozenset()).values == plan.values.by_prompt


def test_prompts_that_the_reference_never_solved_can_be_left_out(model: Path, tmp_path: Path) -> None:
    settings = config(model, tmp_path, **{"vstar.drop_unsolved": True})
    write(settings)
    plan = check_run(settings)
    solved = {load_task(settings.data).train[i].prompt_id for i in range(5)}
    prompts = make_prompts(settings, plan.left_out | plan.values.unsolved)
    assert {prompts.draw(i).prompt_id for i in range(3 * PROMPTS)} == solved
    assert plan.train_problems == 5
    assert "15 prompts that the reference never solved are left out" in "\n".join(explain(settings, plan))
    write(settings, solved=0)
    assert refusal(ConfigError, lambda: check_run(settings)) == (
        "vstar.drop_unsolved must leave a training problem, the reference solved none of 20; set it to false, or start "
        "from a better model"
    )


def test_a_recipe_without_values_takes_no_table_and_one_with_values_needs_it(model: Path, tmp_path: Path) -> None:
    other = config(model, tmp_path, objective={"recipe": "reinforce"})
    path = tmp_path / "values.parquet"
    assert refusal(ConfigError, lambda: check_run(other)) == (
        f"vstar.path must be empty for objective.recipe reinforce, got {str(path)!r}; nothing reads values: remove it, "
        "or choose the recipe a_star_po"
    )
    assert refusal(ConfigError, lambda: check_run(config(model, tmp_path, **{"vstar.path": None}))) == (
        "vstar.path is required for objective.recipe a_star_po, which reads v_star; name a file, and make it with: "
        "distrl vstar CONFIG"
    )
    assert refusal(ConfigError, lambda: check_run(config(model, tmp_path))) == (
        f"vstar.path must be a table of values, there is no file {path}; make it with: distrl vstar CONFIG"
    )


def test_a_table_of_another_reference_grader_or_prompt_set_is_refused(model: Path, tmp_path: Path) -> None:
    settings = config(model, tmp_path)
    write(settings)
    key = key_of(settings)
    another = make_model(tmp_path / "another", 1)
    changed = config(another, tmp_path)
    assert key_of(changed) == replace(key, reference=key_of(changed).reference)
    told = (
        "vstar.path must be a table of this run's reference, grader and sampling, the run and the table differ in {}; "
        "make a table for this config with: distrl vstar CONFIG"
    )
    assert refusal(ConfigError, lambda: check_run(changed)) == told.format(
        f"reference ({key_of(changed).reference!r} and {key.reference!r})"
    )
    # The reference is what counts: the trained model may be another one.
    check_run(config(another, tmp_path, **{"reference.path": str(model)}))
    numeric = config(model, tmp_path, **{"reward.grader": "numeric"})
    assert refusal(ConfigError, lambda: check_run(numeric)) == told.format(
        f"grader ({key_of(numeric).grader!r} and {key.grader!r})"
    )
    more = config(model, tmp_path, **{"data.train_size": PROMPTS + 1})
    first = training_prompts(more, load_task(more.data))[PROMPTS]
    assert refusal(ConfigError, lambda: check_run(more)) == (
        f"vstar.path must have a row for every training prompt, got no row for prompt_sha256 {first.sha256[:12]}... "
        f"(prompt {first.problem.prompt_id}); make a table for this prompt set with: distrl vstar CONFIG"
    )


def test_values_at_another_temperature_than_the_config_says_are_refused(model: Path, tmp_path: Path) -> None:
    write(config(model, tmp_path))
    for changes, told in (({"vstar.beta": 0.1}, "mode soft at beta 0.1"), ({"vstar.mode": "mean"}, "mode mean")):
        settings = config(model, tmp_path, **changes)
        assert refusal(ConfigError, lambda settings=settings: check_run(settings)) == (  # type: ignore[misc]
            f"vstar.mode and vstar.beta must be those of the table, got {told} and the table has mode soft at beta "
            "0.5; distrl vstar CONFIG makes the values anew from the rewards that it has"
        )


STALE = {"objective.options": {"importance": "none"}, "train.max_staleness": 2}


@pytest.mark.parametrize(
    "change",
    [
        {"objective.options": {"importance": "sequence"}},
        {"objective.options": {"importance": "truncated"}},
        {"vstar.beta": 0.001},
        {"train.max_staleness": 0},
    ],
    ids=["ratio", "truncated", "same temperature", "synchronous"],
)
def test_stale_data_is_trained_with_a_ratio_or_with_values_at_its_own_temperature(
    model: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    settings = config(model, tmp_path, **{**STALE, **change})
    write(settings)
    check_run(settings)


@pytest.mark.parametrize(
    ("change", "made"),
    [
        ({}, "mode soft at beta 0.5"),
        ({"vstar.mode": "max"}, "mode max"),
        ({"train.max_staleness": 0, "train.on_stale": "keep"}, "mode soft at beta 0.5"),
    ],
)
def test_the_combination_that_is_biased_is_refused(
    model: Path, tmp_path: Path, change: dict[str, Any], made: str
) -> None:
    settings = config(model, tmp_path, **{**STALE, **change})
    write(settings)
    assert refusal(ConfigError, lambda: check_run(settings)) == (
        "objective.options.importance must correct rollouts of older weights (train.max_staleness "
        f"{settings.train.max_staleness}, train.on_stale {settings.train.on_stale}), got none with values from {made} "
        "and beta 0.001, whose regression has a biased fixed point; use importance sequence or truncated, or values at "
        "the same temperature (vstar.mode=soft vstar.beta=0.001, then distrl vstar CONFIG), or train.max_staleness=0"
    )


def test_the_table_keeps_the_rewards(model: Path, tmp_path: Path) -> None:
    settings = config(model, tmp_path)
    write(settings)
    assert settings.vstar.path is not None
    assert {row.rewards for row in read_table(settings.vstar.path).rows} == {(1.0, 0.0, 0.0, 0.0), (0.0,) * 4}
