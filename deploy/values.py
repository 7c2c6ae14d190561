"""What a config's table of optimal values depends on, and which table a run may train with."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

from actors.value_sampling import Prompt
from distrl.config import Config
from distrl.errors import ConfigError
from distrl.graders.build import Graders, describe
from distrl.manifest import describe as describe_weights
from distrl.models import load_model, load_tokenizer
from distrl.objectives import Recipe
from distrl.prompts import PromptEncoder
from distrl.tasks import Task
from distrl.values_table import Estimate, TableKey, ValueTable, check_table, prompt_sha256, read_table
from distrl.weights import policy_tensors


@dataclass(frozen=True, slots=True)
class RunValues:
    """What a run takes from its table."""

    by_prompt: dict[str, float]
    unsolved: frozenset[str]
    """Ids of the prompts that are left out; empty without `vstar.drop_unsolved`."""


NO_VALUES = RunValues({}, frozenset())


def table_key(config: Config, graders: Graders) -> TableKey:
    """
    Args:
        graders: the run's.
    Raises:
        DataError: the reference model cannot be loaded.
    """
    return TableKey(
        reference=reference_sha256(config),
        grader=grader_version(graders),
        responses=config.vstar.responses,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.run.seed,
    )


def reference_sha256(config: Config) -> str:
    """The manifest hash of the reference model's weights in float32, as it would be published."""
    import torch

    setting = "reference.path" if config.reference.path is not None else "model.path"
    model = load_model(config.reference.path or config.model.path, torch.float32, setting=setting)
    return describe_weights(policy_tensors(model), version=0, step=0).sha256


def grader_version(graders: Graders) -> str:
    """The graders' names with a hash of what they judge by: their settings, and their modules' source or distrl's
    version."""
    parts: list[object] = [version("distrl")]
    for name, one in sorted(graders.items()):
        module, colon, _ = one.named(name).partition(":")
        parts += [name, one.model_dump(mode="json"), inspect.getsource(import_module(module)) if colon else ""]
    return f"{describe(graders)}@{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]}"


def estimate(config: Config) -> Estimate:
    """How V* is made from the rewards; the temperature of the named modes is not read and stands as 0."""
    return Estimate(config.vstar.mode, config.vstar.beta if config.vstar.mode == "soft" else 0.0)


def training_prompts(config: Config, task: Task) -> list[Prompt]:
    """Every distinct training problem with the hash of its tokens, in the order of the training set.

    Raises:
        DataError: a prompt cannot be encoded.
    """
    encoder = PromptEncoder(load_tokenizer(config.model.path))
    distinct = {problem.prompt_id: problem for problem in (task.train[i] for i in range(len(task.train)))}
    return [Prompt(p, prompt_sha256(encoder.encode(p.prompt, p.messages))) for p in distinct.values()]


def check_values(config: Config, recipe: Recipe, graders: Graders, task: Task) -> RunValues:
    """The values that a run trains with, from a table that was made for it.

    Args:
        graders: the run's.
        task: without the prompts that are too long.
    Raises:
        ConfigError: `vstar` is set and not read, or the table is missing, was made for something else, or would bias
            what the recipe trains.
    """
    if "v_star" not in recipe.needs:
        if config.vstar.path is not None:
            raise ConfigError(
                f"vstar.path must be empty for objective.recipe {recipe.name}, got {str(config.vstar.path)!r}; nothing "
                "reads values: remove it, or choose the recipe a_star_po"
            )
        return NO_VALUES
    if config.vstar.path is None:
        raise ConfigError(
            f"vstar.path is required for objective.recipe {recipe.name}, which reads v_star; name a file, and make it "
            "with: distrl vstar CONFIG"
        )
    check_correction(config, recipe)
    table = read_table(config.vstar.path)
    prompts = training_prompts(config, task)
    check_table(table, table_key(config, graders), ((p.problem.prompt_id, p.sha256) for p in prompts))
    if table.estimate != estimate(config):
        raise ConfigError(
            f"vstar.mode and vstar.beta must be those of the table, got {_told(estimate(config))} and the table has "
            f"{_told(table.estimate)}; distrl vstar CONFIG makes the values anew from the rewards that it has"
        )
    return RunValues(table.by_prompt(), _left_out(config, table, prompts))


def check_correction(config: Config, recipe: Recipe) -> None:
    """Refuses a regression on stale data whose fixed point is not the optimal policy.

    On the policy's own responses any V* is a baseline. On those of an older policy the unweighted regression ends at
    the optimum only with V* at the regression's own temperature; an importance ratio repairs any other.

    Raises:
        ConfigError: stale data, no importance ratio, and V* at another temperature.
    """
    stale = config.train.max_staleness > 0 or config.train.on_stale == "keep"
    beta = recipe.options["beta"]
    exact = estimate(config) == Estimate("soft", float(beta))
    if stale and recipe.options["importance"] == "none" and not exact:
        raise ConfigError(
            f"objective.options.importance must correct rollouts of older weights (train.max_staleness "
            f"{config.train.max_staleness}, train.on_stale {config.train.on_stale}), got none with values from "
            f"{_told(estimate(config))} and beta {beta:g}, whose regression has a biased fixed point; use importance "
            f"sequence or truncated, or values at the same temperature (vstar.mode=soft vstar.beta={beta:g}, then "
            "distrl vstar CONFIG), or train.max_staleness=0"
        )


def _left_out(config: Config, table: ValueTable, prompts: Sequence[Prompt]) -> frozenset[str]:
    if not config.vstar.drop_unsolved:
        return frozenset()
    left_out = table.unsolved()
    if all(p.problem.prompt_id in left_out for p in prompts):
        raise ConfigError(
            f"vstar.drop_unsolved must leave a training problem, the reference solved none of {len(prompts)}; set it "
            "to false, or start from a better model"
        )
    return left_out


def _told(made: Estimate) -> str:
    return f"mode soft at beta {made.beta:g}" if made.mode == "soft" else f"mode {made.mode}"
