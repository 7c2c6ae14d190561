"""What a config would run: checked before anything starts, and told in words."""

from dataclasses import dataclass

from distrl.config import Config
from distrl.errors import ConfigError
from distrl.models import load_tokenizer
from distrl.objectives import Recipe, build, check, required_columns
from distrl.rewards import make_grader
from distrl.tasks import Task, load_task

PRODUCED = frozenset({"policy", "behavior", "reference", "rewards", "group"})
"""Models and columns that a run can produce for an objective."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What follows from a config."""

    grader: str
    scores_reference: bool
    recipe: Recipe
    train_problems: int
    heldout_problems: int


def build_recipe(config: Config) -> Recipe:
    """The recipe with its options.

    Raises:
        ConfigError: unknown recipe or option.
    """
    return build(config.objective.recipe, **config.objective.options)


def check_run(config: Config) -> RunPlan:
    """Loads what can be loaded cheaply and refuses what could not run or would train something else than it says.

    Raises:
        ConfigError: options that contradict each other. DataError: prompts or model cannot be used.
    """
    load_tokenizer(config.model.path)
    task = load_task(config.data)
    grader = config.reward.grader or task.default_reward
    make_grader(grader)
    recipe = build_recipe(config)
    # Of a grader of the user's own the range is unknown; ours give rewards in [0, 1].
    lowest_reward = None if ":" in grader else 0.0
    check(recipe, lowest_reward=lowest_reward, group_size=config.rollout.group_size, produced=PRODUCED)
    check_heldout(config, task)
    scores_reference = "reference" in required_columns(recipe)
    if config.reference.path is not None and not scores_reference:
        raise ConfigError(
            f"reference.path must be empty for objective.recipe {config.objective.recipe} as configured, got "
            f"{str(config.reference.path)!r}; nothing reads the reference model: remove it, or set "
            "objective.options.kl_coefficient"
        )
    return RunPlan(grader, scores_reference, recipe, len(task.train), len(task.heldout))


def check_heldout(config: Config, task: Task) -> None:
    """
    Raises:
        ConfigError: there are fewer held-out problems than asked for.
    """
    if len(task.heldout) < config.evaluation.problems:
        raise ConfigError(
            f"evaluation.problems must be <= the held-out problems ({len(task.heldout)}), got "
            f"{config.evaluation.problems}; lower it or raise data.heldout_size"
        )


def explain(config: Config, plan: RunPlan) -> list[str]:
    """The run in words, one line per part."""
    c = config
    rollouts = c.train.tickets_per_step * c.rollout.group_size
    if c.train.max_staleness == 0:
        age = "synchronous: every rollout comes from the newest weights"
    else:
        age = f"at most {c.train.max_staleness} steps old"
        age += (
            "; a step waits for a straggler" if c.train.on_stale == "wait" else "; a straggler is kept whatever its age"
        )
    reference = (
        f"{c.reference.actors} reference actor(s) score every rollout with {c.reference.path or c.model.path}"
        if plan.scores_reference
        else "no reference model: the objective does not read one"
    )
    options = ", ".join(f"{k} {v}" for k, v in plan.recipe.options.items())
    return [
        f"trains    {c.model.path} for {c.train.steps} steps of {rollouts} rollouts "
        f"({c.train.tickets_per_step} prompts x {c.rollout.group_size})",
        f"data      {c.data.source}: {plan.train_problems} training and {plan.heldout_problems} held-out problems",
        f"objective {plan.recipe.name} ({options}); {plan.recipe.source}",
        f"staleness {age}",
        f"samples   {c.generation.actors} generation actor(s), engine {c.generation.engine}, {c.generation.slots} "
        f"responses at a time each, up to {c.rollout.max_new_tokens} tokens at temperature {c.rollout.temperature:g}",
        f"grades    {c.grading.actors} grading actor(s), {plan.grader}, {c.grading.concurrency} tickets at a time each",
        f"scores    {reference}",
        f"learns    1 learner, AdamW at {c.train.learning_rate:g}, a checkpoint every {c.train.checkpoint_every_steps} "
        "steps",
        f"evaluates {c.evaluation.problems} held-out problems before and after"
        + (
            f", {c.evaluation.problems_during} every {c.evaluation.every_steps} steps"
            if c.evaluation.every_steps
            else ""
        ),
        f"keeps     {c.run_dir}",
    ]
