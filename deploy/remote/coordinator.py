"""The coordinator's actor."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.calls import RayCaller
from actors.coordinator import Coordinator
from actors.flight import Flight
from actors.keeper import Keeper
from actors.pipeline import Grades, Pipeline, PipelineLimits
from actors.pool import Pool
from actors.recorder import Recorder
from actors.replays import Replays
from actors.settings import CoordinatorSettings, Prompts
from actors.shifts import ShiftWatch
from actors.updates import UpdateLimits
from deploy.remote.located import Located
from deploy.roles import GENERATION_STAGES, weights_by_role
from deploy.run_dir import RunDir
from deploy.run_storage import storage_at
from distrl.config import Config
from distrl.ledger import Ledger
from distrl.recording import read_recording
from distrl.schema import Role
from distrl.tasks import load_task, prompt_index
from distrl.values_table import read_table

REPLAYED_AT_A_TIME = 8
"""Recorded tickets that the replay actor reads at the same time."""


class CoordinatorActor(Coordinator, Located):
    """`Coordinator` over the handles of the other actors.

    Stages join it, when it begins and when one of their processes was replaced. Ray starts it again when its process
    dies: it then goes on from ledger and journal, and the supervisor lets everybody join again.
    """

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        journal: Any,
        scores_reference: bool,
        left_out: frozenset[str],
        samples: frozenset[Role],
        recorded: Path | None = None,
    ) -> None:
        """
        Args:
            recorded: ledger of the run whose recording is replayed.
        """
        storage = storage_at(config.storage.uri, run_dir)
        generation = dict.fromkeys(GENERATION_STAGES.values(), config.generation.slots)
        replay = REPLAYED_AT_A_TIME * config.rollout.group_size
        self._capacity = {**generation, "grading": config.grading.concurrency, "reference": 1, "replay": replay}
        own_roles = [role for role in weights_by_role(config, samples) if role != Role.POLICY]
        own_pools: dict[Role, Pool] = {role: Pool(GENERATION_STAGES[role]) for role in own_roles}
        if recorded is not None:
            own_pools[Role.REPLAY] = Pool("replay")
        pipeline = Pipeline(
            Pool("generation"),
            Pool("grading"),
            Pool("reference") if scores_reference else None,
            RayCaller("journal", journal),
            pipeline_limits(config),
            time.time,
            episodes=config.environment.name is not None,
            own_pools=own_pools,
        )
        recorder = Recorder(run_dir.metrics, time.time)
        pipeline.on_graded = graded_watch(config, recorder)
        ledger = Ledger(run_dir.ledger)
        super().__init__(
            coordinator_settings(config, samples),
            ledger,
            make_prompts(config, left_out),
            pipeline,
            recorder,
            time.time,
            Keeper(run_dir.ledger, storage.checkpoints, storage.ledgers),
            None if recorded is None else Replays(ledger, read_recording(recorded), config.replay.epochs),
        )

    async def join_actor(self, stage: str, name: str, handle: Any) -> None:
        """A stage's process is there; see `Coordinator.join`."""
        await self.join(stage, RayCaller(name, handle), self._capacity[stage])


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
    heldout = task.heldout[: config.evaluation.problems] if config.samples else ()
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
        outage_s=config.limits.outage_s,
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
        redraws=config.limits.redraws,
        drop_abandoned=config.train.abandoned_rollouts == "drop",
        turns=config.placement.mode == "turns",
        opponents=Role.OPPONENT in samples,
        replays_per_step=config.replays_per_step,
    )
