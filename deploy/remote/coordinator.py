"""The coordinator's actor."""

import time
from collections.abc import Callable
from typing import Any

from actors.calls import RayCaller
from actors.coordinator import Coordinator, CoordinatorSettings, Prompts
from actors.flight import Flight
from actors.pipeline import Grades, Pipeline, PipelineLimits
from actors.pool import Pool
from actors.recorder import Recorder
from actors.shifts import ShiftWatch
from actors.updates import UpdateLimits
from deploy.run_dir import RunDir
from distrl.config import Config
from distrl.ledger import Ledger
from distrl.schema import Role
from distrl.tasks import load_task, prompt_index
from distrl.values_table import read_table

GENERATION_STAGES = {
    Role.POLICY: "generation",
    Role.EVALUATION: "evaluation",
    Role.REFERENCE: "reference-sampling",
    Role.OPPONENT: "opponent",
}
"""By role, what the generation actors are called that sample for it."""


class CoordinatorActor(Coordinator):
    """`Coordinator` over the handles of the other actors."""

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        handles: dict[str, list[Any]],
        left_out: frozenset[str] = frozenset(),
        samples: frozenset[Role] = frozenset(),
    ) -> None:
        pools = {}
        for stage, capacity in (
            *((stage, config.generation.slots) for stage in GENERATION_STAGES.values()),
            ("grading", config.grading.concurrency),
            ("reference", 1),
        ):
            pools[stage] = Pool(stage)
            for i, handle in enumerate(handles.get(stage, [])):
                pools[stage].add(RayCaller(f"{stage}-{i}", handle), capacity)
        pipeline = Pipeline(
            pools["generation"],
            pools["grading"],
            pools["reference"] if handles["reference"] else None,
            RayCaller("journal", handles["journal"][0]),
            pipeline_limits(config),
            time.time,
            episodes=config.environment.name is not None,
            own_pools={
                role: pools[stage]
                for role, stage in GENERATION_STAGES.items()
                if role != Role.POLICY and handles.get(stage)
            },
        )
        recorder = Recorder(run_dir.metrics, time.time)
        pipeline.on_graded = graded_watch(config, recorder)
        super().__init__(
            coordinator_settings(config, samples),
            Ledger(run_dir.ledger),
            make_prompts(config, left_out),
            pipeline,
            recorder,
            time.time,
        )


def graded_watch(config: Config, recorder: Recorder) -> Callable[[Flight, Grades], None]:
    """Watches what graders say of the policy's rollouts, and records sudden shifts."""
    grading = config.grading
    watch = ShiftWatch(grading.alert_tickets, grading.alert_sigmas, lambda text: recorder.event("alert", text))

    def observe(flight: Flight, grades: Grades) -> None:
        if flight.ticket.role == Role.POLICY and grading.alert_sigmas:
            found = {
                "reward": grades.reward_sum / grades.rollouts,
                "pass rate": grades.correct / grades.rollouts,
                "response tokens": flight.response_tokens / grades.rollouts,
            }
            watch.observe(found | {f"component {name}": value for name, value in grades.components.items()})

    return observe


def make_prompts(config: Config, left_out: frozenset[str]) -> Prompts:
    """What tickets and evaluations draw from; the same in every process.

    Args:
        left_out: ids of the prompts that the driver found to be too long, or never solved by the reference; it has the
            tokenizer, this process has not.
    """
    task = load_task(config.data)
    if config.vstar.drop_unsolved:
        task = task.in_memory()  # only then a prompt can be left out of a set that is made when it is asked for
    task = task.without(left_out)
    values = {} if config.vstar.path is None else read_table(config.vstar.path).by_prompt()
    seed, size = config.run.seed, len(task.train)
    heldout = task.heldout[: config.evaluation.problems]
    return Prompts(
        draw=lambda ticket_id: task.train[prompt_index(seed, ticket_id, size)],
        heldout=heldout,
        heldout_during=heldout[: config.evaluation.problems_during],
        values=values,
    )


def pipeline_limits(config: Config) -> PipelineLimits:
    """The bounds of stage calls from the config."""
    return PipelineLimits(
        attempts=config.limits.call_attempts,
        retry_delay_s=config.limits.retry_delay_s,
        generation_timeout_s=config.generation.timeout_s,
        grading_timeout_s=config.grading.timeout_s,
        reference_timeout_s=config.reference.timeout_s,
        journal_timeout_s=config.limits.journal_timeout_s,
        grading_tickets_per_call=config.grading.tickets_per_call,
        reference_tickets_per_call=config.reference.tickets_per_call,
    )


def coordinator_settings(config: Config, samples: frozenset[Role] = frozenset()) -> CoordinatorSettings:
    """The coordinator's part of the config."""
    return CoordinatorSettings(
        seed=config.run.seed,
        steps=config.train.steps,
        group_size=config.rollout.group_size,
        admission=config.admission,
        on_stale=config.train.on_stale,
        updates=UpdateLimits(
            attempts=config.limits.call_attempts,
            retry_delay_s=config.limits.retry_delay_s,
            sync_timeout_s=config.limits.sync_timeout_s,
            publish_timeout_s=config.limits.publish_timeout_s,
        ),
        ready_bytes=config.limits.ready_bytes,
        drops_in_a_row=config.limits.drops_in_a_row,
        evaluate_every_steps=config.evaluation.every_steps,
        keep_checkpoints=config.train.keep_checkpoints,
        turns=config.placement.mode == "turns",
        opponents=Role.OPPONENT in samples,
    )
