"""A run in words, before it starts."""

from deploy.check import RunPlan
from deploy.replay_check import in_words
from deploy.roles import generation_actors, own_actors
from distrl.config import Config
from distrl.graders.build import describe
from distrl.schema import Role
from distrl.tickets import weights_of


def _places(config: Config, plan: RunPlan) -> list[str]:
    """The run's GPUs in words; no line for a CPU run."""
    p, actors = config.placement, sum(generation_actors(config, plan.samples).values())
    how = {
        "separate": f"{config.generation.tensor_parallel_size} GPU(s) for each of {actors} generation actor(s)",
        "shared": f"generation actors share one GPU, {p.generation_share:g} of its memory each",
        "turns": "generation actors on one GPU, whose memory they give back while the learner trains",
    }
    if config.train.device == "cuda":
        how["shared"] += f", {p.learner_share:g} for the learner"
        how["turns"] += ", and the learner while they sample"
    return [] if p.mode == "cpu" else [f"places    {how[p.mode]}"]


def explain(config: Config, plan: RunPlan) -> list[str]:
    """The run in words, one line per part."""
    c = config
    rollouts = c.train.tickets_per_step * c.rollout.group_size
    if c.train.max_staleness == 0:
        age = "synchronous: every rollout comes from the newest weights"
    else:
        age = f"at most {c.train.max_staleness} steps old"
        age += (
            "; "
            + {
                "wait": "a step waits for a straggler",
                "redraw": f"a straggler is drawn again, {c.limits.redraws} times at most",
                "keep": "a straggler is kept whatever its age",
            }[c.train.on_stale]
        )
    reference = (
        f"{c.reference.actors} reference actor(s) score every rollout with {c.reference.path or c.model.path}"
        if plan.scores_reference
        else "no reference model: the objective does not read one"
    )
    left_out = (
        f"; {len(plan.left_out)} prompts longer than {c.data.max_prompt_tokens} tokens are left out"
        if c.data.max_prompt_tokens is not None
        else ""
    )
    if plan.values.unsolved:
        left_out += f"; {len(plan.values.unsolved)} prompts that the reference never solved are left out"
    if c.preference.function is not None:
        who = plan.recipe.upkeep.get(weights_of(Role.OPPONENT))
        how = "in pairs" if who is None else f"{plan.opponents} opponent(s) each: {who.describe()}"
        reference += f"; {c.preference.function} compares responses with {how}"
    options = ", ".join(f"{k} {v}" for k, v in plan.recipe.options.items())
    return [
        f"trains    {c.model.path} for {c.train.steps} steps of {rollouts} rollouts "
        f"({c.train.tickets_per_step} prompts x {c.rollout.group_size})",
        f"data      {c.data.source}: {plan.train_problems} training and {plan.heldout_problems} held-out problems"
        + left_out,
        f"objective {plan.recipe.name} ({options}); {plan.recipe.source}",
        *([] if plan.replay is None else [in_words(c, plan.replay)]),
        *([] if c.offline else [f"staleness {age}"]),
        *(_sampling_in_words(c, plan) if c.samples else ["samples   nothing: no generation and no grading actors"]),
        f"scores    {reference}",
        _explain_learner(config),
        *([_evaluation_in_words(c)] if c.samples else []),
        *_places(c, plan),
        f"keeps     {c.run_dir}",
    ]


def _sampling_in_words(c: Config, plan: RunPlan) -> list[str]:
    actors = 0 if c.offline else c.generation.actors
    return [
        f"samples   {actors} generation actor(s), engine {c.generation.engine}, {c.generation.slots} "
        f"responses at a time each, up to {c.rollout.max_new_tokens} tokens at temperature {c.rollout.temperature:g}"
        + "".join(f"; {n} more for {role} alone" for role, n in own_actors(c).items() if n),
        *_environment_in_words(c),
        f"grades    {c.grading.actors} grading actor(s), {describe(plan.graders)}, {c.grading.concurrency} tickets at "
        "a time each",
    ]


def _evaluation_in_words(c: Config) -> str:
    during = (
        f", {c.evaluation.problems_during} every {c.evaluation.every_steps} steps" if c.evaluation.every_steps else ""
    )
    return f"evaluates {c.evaluation.problems} held-out problems before and after{during}"


def _environment_in_words(c: Config) -> list[str]:
    e = c.environment
    if e.name is None:
        return []
    return [f"plays     {e.actors} environment actor(s), {e.name}: at most {e.max_turns} messages an episode"]


def _explain_learner(config: Config) -> str:
    t = config.train
    workers = f"{t.workers} worker(s)" + ("" if t.workers == 1 and t.parallel == "ddp" else f", {t.parallel}")
    alone = " published alone" if config.lora.publish == "adapter" else ""
    what = f"adapters of rank {config.lora.rank}{alone}, " if config.lora.rank else ""
    schedule = "" if t.lr_schedule == "constant_with_warmup" else f", {t.lr_schedule}"
    return (
        f"learns    {workers} on {t.device}, {t.dtype}, {what}AdamW at {t.learning_rate:g}{schedule}, a checkpoint "
        f"every {t.checkpoint_every_steps} steps"
    )
