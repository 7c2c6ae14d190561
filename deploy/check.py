"""What a config would run: checked before anything starts, and told in words."""

from dataclasses import dataclass
from importlib.util import find_spec

from deploy.preferences import check_preference
from deploy.replay_check import ReplayPlan, check_replay
from deploy.roles import generation_actors, own_actors
from deploy.values import RunValues, check_values
from distrl.config import Config
from distrl.environments.registry import KNOWN, environment_factory
from distrl.errors import ConfigError
from distrl.graders.build import Graders, chosen_graders, lowest_reward
from distrl.graders.registry import BUILT_IN, check_columns, check_options
from distrl.models import check_model, load_tokenizer
from distrl.objectives import Recipe, build, check, required_columns
from distrl.objectives.upkeep import Frozen
from distrl.placement import Claim, check_shares
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
    if config.reference.path is not None and not scores_reference:
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


def check_placement(config: Config, samples: frozenset[Role]) -> None:
    """Refuse what no cluster could run; whether a certain one can, is known when it is there.

    Raises:
        ConfigError: names the key, and the shortfall where it is one.
    """
    p = config.placement
    if p.mode == "cpu":
        return
    if config.generation.engine == "transformers":
        raise ConfigError(
            f"placement.mode must be cpu for generation.engine transformers, which runs on the CPU, got {p.mode}; "
            "leave it out, or take another engine"
        )
    if p.mode == "turns" and config.train.max_staleness != 0:
        raise ConfigError(
            f"train.max_staleness must be 0 for placement.mode turns, got {config.train.max_staleness}; generation "
            "and learner never work at the same time there, and an asynchronous run needs that they do"
        )
    if p.mode != "separate" and config.train.device == "cuda":
        for key, value, only in (("workers", config.train.workers, 1), ("parallel", config.train.parallel, "ddp")):
            if value != only:
                raise ConfigError(
                    f"train.{key} must be {only} for placement.mode {p.mode} with train.device cuda, got {value}; "
                    "there is one GPU, which has one learner: set placement.mode=separate"
                )
    for key in ("gpu_memory_utilization", "enable_sleep_mode"):
        if p.mode != "separate" and key in config.generation.engine_args:
            raise ConfigError(
                f"generation.engine_args.{key} must not be set for placement.mode {p.mode}, which sets it, got "
                f"{config.generation.engine_args[key]!r}; set placement.generation_share instead"
            )
    if p.mode != "separate" and config.generation.tensor_parallel_size > 1:
        raise ConfigError(
            f"generation.tensor_parallel_size must be 1 for placement.mode {p.mode}, where there is one GPU, got "
            f"{config.generation.tensor_parallel_size}; set placement.mode=separate"
        )
    actors = sum(generation_actors(config, samples).values())
    if p.mode in ("shared", "turns"):
        shares = [Claim(f"generation-{i}", p.generation_share) for i in range(actors)]
        if p.mode == "shared" and config.train.device == "cuda":
            shares.append(Claim("learner-0", p.learner_share))
        check_shares(shares)


def check_transport(config: Config) -> None:
    """Refuse a way of new weights that its two ends cannot take.

    Raises:
        ConfigError: names the key.
    """
    way, p = config.generation.transport, config.placement
    if way == "store":
        return
    if config.generation.engine != "vllm":
        raise ConfigError(
            f"generation.transport must be store for generation.engine {config.generation.engine}, which has no GPU, "
            f"got {way}; leave it out, or take the engine vllm"
        )
    if config.train.device != "cuda":
        raise ConfigError(
            f"generation.transport must be store where train.device is {config.train.device}, got {way}; the bytes go "
            "from the learner's GPU: leave it out, or set train.device=cuda"
        )
    needs = {"nccl": "separate", "ipc": "shared"}[way]
    if p.mode != needs:
        why = {
            "nccl": "a group of NCCL has each process on a GPU of its own",
            "ipc": "CUDA IPC shares memory of one GPU that both are on at the same time",
        }[way]
        raise ConfigError(
            f"generation.transport {way} needs placement.mode {needs}, got {p.mode}; {why}: set "
            f"placement.mode={needs}, or leave generation.transport out"
        )
    limits = config.limits
    if not 2 * limits.transport_timeout_s < limits.sync_timeout_s:
        raise ConfigError(
            f"limits.transport_timeout_s must be less than half of limits.sync_timeout_s ({limits.sync_timeout_s:g}), "
            f"got {limits.transport_timeout_s:g}; what is late must have time left to come from the store"
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
