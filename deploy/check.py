"""What a config would run: checked before anything starts, and told in words."""

from dataclasses import dataclass
from importlib.util import find_spec

from deploy.check_gpus import check_placement, check_transport
from deploy.preferences import check_preference
from deploy.replay_check import ReplayPlan, check_replay
from deploy.roles import own_actors
from deploy.values import RunValues, check_values
from distrl.config import Config
from distrl.environments.registry import KNOWN, environment_factory
from distrl.errors import ConfigError
from distrl.graders.build import Graders, chosen_graders, lowest_reward
from distrl.graders.registry import BUILT_IN, check_columns, check_options
from distrl.models import check_model, load_tokenizer
from distrl.objectives import Recipe, build, check, required_columns
from distrl.objectives.upkeep import Frozen, Mixture
from distrl.prompts import Lengths, PromptEncoder, check_lengths
from distrl.sandbox.bubblewrap import check_sandbox
from distrl.schema import Role
from distrl.tasks import Task, load_task
from learners.optimizer import OptimizerSettings, check_schedule

SAMPLED = {"preference": Role.OPPONENT}
"""Columns that need responses of others than the policy while a run trains, with whose."""

PRODUCED = frozenset(
    {
        *("policy", "behavior", "proximal", "reference", "rewards", "group", "values", "v_star"),
        *("preference", "pairs", "pair_preference"),
    }
)
"""Models and columns that a run can produce for an objective."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What follows from a config."""

    graders: Graders
    scores_reference: bool
    recipe: Recipe
    train_problems: int
    heldout_problems: int
    left_out: frozenset[str]
    """Ids of the prompts that are longer than `data.max_prompt_tokens`."""
    longest_prompt: int
    """Tokens."""
    values: RunValues
    """Optimal values of the prompts, where the objective reads them."""
    opponents: int = 0
    """Opponents that each response is compared with."""
    samples: frozenset[Role] = frozenset({Role.POLICY, Role.EVALUATION})
    """Roles that generation actors sample for."""
    replay: ReplayPlan | None = None


def moving(recipe: Recipe) -> frozenset[str]:
    """The models that follow the policy, which the learner keeps; a frozen one is no such model."""
    return frozenset(name for name, kept in recipe.upkeep.items() if not isinstance(kept, Frozen))


def build_recipe(config: Config) -> Recipe:
    """The recipe with its options.

    Raises:
        ConfigError: unknown recipe or option.
    """
    return build(config.objective.recipe, **config.objective.options)


def optimizer_settings(config: Config) -> OptimizerSettings:
    """The optimizer's part of the config."""
    t = config.train
    return OptimizerSettings(
        t.learning_rate,
        t.lr_warmup_steps,
        t.weight_decay,
        t.betas,
        t.max_grad_norm,
        t.lr_schedule,
        t.lr_schedule_options,
        t.steps,
    )


def check_run(config: Config) -> RunPlan:
    """Loads what can be loaded cheaply and refuses what could not run or would train something else than it says.

    Raises:
        ConfigError: options that contradict each other. DataError: prompts or model cannot be used.
    """
    _check_engine(config)
    whole = load_task(config.data)
    lengths = measure_prompts(config, whole)
    task = whole.without(lengths.left_out)
    graders = check_graders(config, task)
    recipe = build_recipe(config)
    # What follows the policy is kept and scored by the learner.
    produced = PRODUCED | recipe.upkeep.keys()
    check(recipe, lowest_reward=lowest_reward(graders), group_size=config.rollout.group_size, produced=produced)
    if config.samples:
        check_heldout(config, task)
    _check_learner(config, lengths.longest)
    scores_reference = "reference" in required_columns(recipe) and "reference" not in moving(recipe)
    mixed = any(isinstance(kept, Mixture) and kept.share for kept in recipe.upkeep.values())
    if config.reference.path is not None and not scores_reference and not mixed:
        raise ConfigError(
            f"reference.path must be empty for objective.recipe {config.objective.recipe} as configured, got "
            f"{str(config.reference.path)!r}; nothing reads the reference model: remove it, or set "
            "objective.options.kl_coefficient"
        )
    if config.reference.path is not None:
        check_model(config.reference.path, setting="reference.path")
    values = check_values(config, recipe, graders, task)
    needed = {SAMPLED[column] for column in required_columns(recipe) & SAMPLED.keys()}
    samples = frozenset(sampled_roles(config) | needed)
    replay = check_replay(config, recipe, graders, task, samples)
    # Values are sampled before the run, by distrl vstar and the same config.
    before = {Role.REFERENCE} if "v_star" in required_columns(recipe) else set()
    _check_actors(config, samples | before)
    check_placement(config, samples)
    check_transport(config)
    return RunPlan(
        graders,
        scores_reference,
        recipe,
        len(task.train) - len(values.unsolved),
        len(task.heldout),
        lengths.left_out,
        lengths.longest,
        values,
        check_preference(config, recipe),
        samples,
        replay,
    )


def sampled_roles(config: Config) -> frozenset[Role]:
    """Roles that generation actors sample for, whatever the objective."""
    training = frozenset[Role]() if config.offline else frozenset({Role.POLICY})
    return training | (frozenset({Role.EVALUATION}) if config.samples else frozenset())


def _check_engine(config: Config) -> None:
    if config.generation.engine != "vllm":
        return
    if find_spec("vllm") is None:
        raise ConfigError(
            "generation.engine vllm must have vLLM installed beside distrl, found none; install distrl[vllm] on a "
            "machine with GPUs, make the environment of docs/vllm.md on one without, or set "
            "generation.engine=transformers"
        )
    if config.generation.engine_args:
        # Imported here: it takes many seconds.
        from actors.engines.vllm_start import check_engine_args

        check_engine_args(config.generation.engine_args)


def _check_actors(config: Config, samples: frozenset[Role]) -> None:
    """
    Raises:
        ConfigError: generation actors for a role that nothing is sampled for.
    """
    for role, actors in own_actors(config).items():
        if actors and role not in samples:
            raise ConfigError(
                f"generation.{role}_actors must be 0 for objective.recipe {config.objective.recipe} as configured, got "
                f"{actors}; nothing is sampled for that role: remove it"
            )


def measure_prompts(config: Config, task: Task, *, setting: str = "model.path") -> Lengths:
    """Which prompts are left out, and how long the longest other is, by the model's own tokenizer.

    Args:
        setting: where the model's directory was set, for messages.
    Raises:
        ConfigError, DataError: the model cannot be used, or a prompt does not fit into its context.
    """
    context_length = check_model(config.model.path, setting=setting)
    encoder = PromptEncoder(load_tokenizer(config.model.path, setting=setting))
    if config.data.chat_template == "model":
        encoder.check_template()
    return check_lengths(
        task,
        encoder,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_new_tokens=config.rollout.max_new_tokens,
        context_length=context_length,
    )


def _check_learner(config: Config, longest_prompt: int) -> None:
    """
    Raises:
        ConfigError: a response may be too long for a micro-batch, or the learning rate has no such schedule.
    """
    check_schedule(optimizer_settings(config))
    t = config.train
    longest = longest_prompt + config.rollout.max_new_tokens
    if longest > t.micro_batch_tokens:
        raise ConfigError(
            f"train.micro_batch_tokens must be >= the longest prompt ({longest_prompt} tokens) with "
            f"rollout.max_new_tokens ({config.rollout.max_new_tokens}), {longest}, got {t.micro_batch_tokens}; raise "
            "it, or lower data.max_prompt_tokens"
        )
    if config.lora.rank == 0 and config.lora.targets:
        raise ConfigError(
            f"lora.targets must be empty where lora.rank is 0, got {list(config.lora.targets)}; all parameters "
            "are trained"
        )
    if config.lora.rank == 0 and config.lora.publish != "merged":
        raise ConfigError(
            f"lora.publish must be merged where lora.rank is 0, got {config.lora.publish}; there are no adapters to "
            "publish: set lora.rank, or leave lora.publish out"
        )
    if config.lora.rank and find_spec("peft") is None:
        raise ConfigError(
            f"lora.rank must be 0 where peft is not installed, got {config.lora.rank}; pip install 'distrl[lora]'"
        )


def check_graders(config: Config, task: Task) -> Graders:
    """The run's graders by name.

    Raises:
        ConfigError: one is unknown, has options that do not suit it, or needs what the data lacks.
    """
    check_environment(config)
    default = task.default_reward if config.environment.name is None else "episode"
    graders = chosen_graders(config.reward.grader, config.reward.graders, default)
    for name, one in graders.items():
        setting = f"reward.graders.{name}.grader" if config.reward.graders else "reward.grader"
        target = one.named(name)
        known = BUILT_IN.get(target)
        if config.data.answer_key == "" and known is not None and known.needs_answer:
            raise ConfigError(
                f"{setting} must be a function of your own where data.answer_key is '' and there are no answers, got "
                f"{target!r}; set it to module:function, or name the column of the answers in data.answer_key"
            )
        check_options(target, one.options, setting=setting)
        if known is not None and known.sandboxed:
            check_sandbox(config.sandbox, setting=f"{setting} {target}")
        check_columns(target, task.heldout[0], setting=setting)
    return graders


def check_environment(config: Config) -> None:
    """
    Raises:
        ConfigError: there is no such environment, its options do not suit it, or it needs a sandbox and there is none.
    """
    environment = config.environment
    if environment.name is None:
        if environment.options:
            raise ConfigError(
                f"environment.options must be empty where environment.name is, got {environment.options!r}; name the "
                "environment, or remove them"
            )
        return
    make = environment_factory(config)
    if environment.name in KNOWN and environment.name != "verifiers":
        make()  # cheap, and says what an environment of ours cannot do here


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
