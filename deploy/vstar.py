"""Makes the table of optimal values: samples the reference model with a run's actors, grades, and writes Parquet."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch

from actors.calls import RayCaller
from actors.pipeline import Pipeline, TicketFailedError
from actors.pool import Pool
from actors.value_sampling import Prompt, ValueSampler
from deploy.check import check_graders, measure_prompts
from deploy.placement import generation_claims, gpu_nodes
from deploy.remote.coordinator import pipeline_limits
from deploy.remote.generation import GenerationActor
from deploy.remote.grading import GradingActor
from deploy.roles import GENERATION_STAGES
from deploy.start import start_ray
from deploy.values import estimate, table_key, training_prompts
from distrl.config import Config
from distrl.errors import ConfigError, StageError
from distrl.graders.build import Graders
from distrl.objectives import optimal_value
from distrl.placement import check_fits
from distrl.schema import Role
from distrl.tasks import load_task
from distrl.tickets import weights_of
from distrl.values_table import (
    Estimate,
    Parts,
    PromptRewards,
    TableKey,
    check_table,
    read_table,
    write_table,
)

FLUSH_PROMPTS = 64
"""A file of finished prompts is written when there are so many."""
FLUSH_S = 2.0
"""And at the latest after so many seconds: a killed process loses little."""

Advance = Callable[[int, int], None]
"""Told (prompts done, prompts) whenever one is done."""


def make_table(config: Config, advance: Advance) -> dict[str, Any]:
    """Estimates V* of every training prompt, going on from what an earlier call left.

    Returns:
        The table's path, prompts, how many were sampled now, the share that the reference solved, and mean V*.
    Raises:
        ConfigError, DataError: the config cannot be used, or the table that is there was made for another one, or the
            cluster never has the GPUs.
        StageError: some prompts could not be sampled or graded; the others are kept for the next call.
    """
    if config.vstar.path is None:
        raise ConfigError("vstar.path is required, the table of values is written there; pass vstar.path=...")
    began = time.monotonic()
    path = config.vstar.path
    whole = load_task(config.data)
    task = whole.without(measure_prompts(config, whole).left_out)
    graders = check_graders(config, task)
    key, made = table_key(config, graders), estimate(config)
    prompts = training_prompts(config, task)
    if path.exists():
        table = read_table(path)
        check_table(table, key, ((p.problem.prompt_id, p.sha256) for p in prompts))
        rows, sampled = {row.prompt_id: row for row in table.rows}, 0
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = Parts(path, key)
        rows = parts.open()
        missing = [p for p in prompts if p.problem.prompt_id not in rows]
        advance(len(prompts) - len(missing), len(prompts))
        rows |= _sample(config, graders, missing, parts, lambda done: advance(len(rows) + done, len(prompts)))
        sampled = len(missing)
    ordered = [rows[p.problem.prompt_id] for p in prompts]
    v_star = _write(config, key, made, ordered)
    if sampled or not path.exists():
        Parts(path, key).remove()
    solved = sum(row.correct > 0 for row in ordered)
    return {
        "path": str(path),
        "prompts": len(ordered),
        "sampled": sampled,
        "solved": solved / len(ordered),
        "v_star_mean": sum(v_star) / len(v_star),
        "mode": made.mode,
        "beta": made.beta,
        "wall_s": round(time.monotonic() - began, 3),
    }


def _write(config: Config, key: TableKey, made: Estimate, rows: Sequence[PromptRewards]) -> list[float]:
    assert config.vstar.path is not None
    rewards = torch.tensor([row.rewards for row in rows], dtype=torch.float64)
    v_star: list[float] = optimal_value(rewards, mode=config.vstar.mode, beta=config.vstar.beta).tolist()
    write_table(config.vstar.path, key, made, rows, v_star)
    return v_star


def _sample(
    config: Config, graders: Graders, prompts: Sequence[Prompt], parts: Parts, advance: Callable[[int], None]
) -> dict[str, PromptRewards]:
    """Starts Ray with the generation and grading actors and samples; every finished prompt is kept in `parts`."""
    if not prompts:
        return {}
    own_ray = start_ray()
    try:
        return asyncio.run(_drive(config, graders, prompts, parts, advance))
    finally:
        if own_ray:
            ray.shutdown()


async def _drive(
    config: Config, graders: Graders, prompts: Sequence[Prompt], parts: Parts, advance: Callable[[int], None]
) -> dict[str, PromptRewards]:
    generation, grading = Pool("generation"), Pool("grading")

    def create(gpus: float, actor: type, *arguments: Any) -> Any:
        options = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        return ray.remote(actor).options(**options).remote(*arguments)

    actors = config.generation.reference_actors or config.generation.actors
    names = [f"{GENERATION_STAGES[Role.REFERENCE]}-{i}" for i in range(actors)]
    claimed = generation_claims(config, names)
    check_fits(claimed, gpu_nodes())
    gpus = {claim.name: claim.gpus for claim in claimed}
    for name in names:
        # No policy store: these weights are never replaced.
        actor = create(gpus.get(name, 0.0), GenerationActor, config, name, None, (weights_of(Role.REFERENCE),))
        generation.add(RayCaller(name, actor), config.generation.slots)
    for i in range(config.grading.actors):
        actor = create(0.0, GradingActor, config, graders, os.getcwd())
        grading.add(RayCaller(f"grading-{i}", actor), config.grading.concurrency)
    # Nothing is journalled: the table is what is kept.
    nobody = RayCaller("journal", None)
    pipeline = Pipeline(generation, grading, None, nobody, pipeline_limits(config), time.time)

    async def read(reference: Any) -> Any:
        return await reference

    sampler = ValueSampler(pipeline, config.run.seed, config.vstar.responses, read, time.time)
    return await collect(sampler, prompts, parts, advance)


async def collect(
    sampler: ValueSampler, prompts: Sequence[Prompt], parts: Parts, advance: Callable[[int], None]
) -> dict[str, PromptRewards]:
    """Samples the prompts and writes what is done to `parts`, also when it ends early.

    Raises:
        StageError: prompts failed; everything else is done and kept.
    """
    found: dict[str, PromptRewards] = {}
    waiting: list[PromptRewards] = []
    failures: list[TicketFailedError] = []
    flushed_s = time.monotonic()

    def done(one: PromptRewards | TicketFailedError) -> None:
        nonlocal flushed_s
        if isinstance(one, TicketFailedError):
            failures.append(one)
            return
        found[one.prompt_id] = one
        waiting.append(one)
        advance(len(found))
        if len(waiting) >= FLUSH_PROMPTS or time.monotonic() - flushed_s > FLUSH_S:
            parts.add(waiting)
            waiting.clear()
            flushed_s = time.monotonic()

    try:
        await sampler.run(prompts, done)
    finally:
        parts.add(waiting)
    if failures:
        raise StageError(
            f"{len(failures)} of {len(prompts)} prompts could not be sampled and graded, the last cause was "
            f"{failures[-1]}; the others are kept: call distrl vstar again when the cause is mended"
        )
    return found
