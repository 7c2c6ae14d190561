"""A run without Ray: the real coordinator, stages, ledger, journal and policy store as objects in one process."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from actors.calls import LocalCaller
from actors.coordinator import Coordinator
from actors.engines.fake import FakeEngine
from actors.generation import Generation
from actors.grading import Grading
from actors.journal import Journal
from actors.pipeline import Pipeline, PipelineLimits
from actors.policy_store import PolicyStore
from actors.pool import Pool
from actors.recorder import Recorder
from actors.reference import Reference
from actors.replay import Replay
from actors.replays import Replays
from actors.settings import CoordinatorSettings, Prompts
from actors.updates import UpdateLimits
from distrl.graders.limited import LimitedGrader
from distrl.ledger import Ledger
from distrl.manifest import cut, describe, lay_out
from distrl.messages import BatchGrant, Content, Layout, Manifest, StepReport
from distrl.recording import read_recording
from distrl.rewards import Grade, Grader
from distrl.sampling import SampleRequest, SamplingParams
from distrl.schema import Role
from distrl.staleness import Admission
from distrl.storage import Folder
from distrl.tasks import Message, Problem
from distrl.tickets import Ticket, weights_of
from tests.builders import threaded

GROUP_SIZE = 2
PARAMS = SamplingParams(max_new_tokens=4)


class Digits:
    """Tokens 1 to 10 are the digits; 0 ends a response."""

    def encode(self, prompt: str, messages: Sequence[Message] = ()) -> tuple[int, ...]:
        return tuple(int(c) + 1 for c in (messages[-1].content if messages else prompt))

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(str(i - 1) for i in token_ids if 0 < i <= 10)


def half_right(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
    """Every second response is correct: the mean reward of a group is 1/2."""
    return [Grade(float(i % 2), {}, "correct" if i % 2 else "wrong") for i in range(len(responses))]


@dataclass
class InProcessRun:
    """What a test may touch."""

    coordinator: Coordinator
    ledger: Ledger
    store: PolicyStore
    engines: list[FakeEngine]
    pipeline: Pipeline
    before_fetch: Callable[[int], Awaitable[None]] | None = None
    """Awaited with the version whenever a generation actor asks the store for one."""

    async def learn(self, step: int) -> BatchGrant:
        """One step of a learner that publishes the step's number as its only weight."""
        grant = await self.coordinator.next_batch(step)
        assert isinstance(grant, BatchGrant)
        await self.finish_step(grant)
        return grant

    async def restore(self, step: int) -> None:
        """What a learner does that was restored to a checkpoint of `step`: publishes its weights again."""
        version = await self.coordinator.restored(step)
        await self.publish(version, step)

    async def finish_step(self, grant: BatchGrant) -> None:
        await self.publish(await self.report(grant), grant.step)

    async def report(self, grant: BatchGrant) -> int:
        """The step is done; the version to publish."""
        report = StepReport(grant.step, 0.0, 0.0, 0.0, {"loss": 0.0})
        return await self.coordinator.trained(report, {t.ticket_id: t.staleness for t in grant.tickets})

    async def checkpoint(self, step: int, version: int) -> None:
        await self.coordinator.commit_checkpoint(f"step-{step}", step, version, "0" * 64)

    async def publish(self, version: int, step: int) -> None:
        await self.publish_as("policy", version, step)

    async def publish_as(self, weights: str, version: int, step: int) -> None:
        tensors = {"weight": torch.tensor([float(step)])}
        manifest = await send(self.store, tensors, version=version, step=step, weights=weights)
        await self.coordinator.published(version, step, manifest.sha256, weights)


async def send(
    store: PolicyStore, tensors: Mapping[str, torch.Tensor], *, version: int, step: int, weights: str = "policy"
) -> Manifest:
    """Publishes in a store without Ray: what it lacks, in chunks of 16 bytes."""
    manifest = describe(tensors, version=version, step=step, weights=weights)
    wanted = await store.wanted(manifest)
    layout = lay_out([entry for entry in manifest.tensors if entry.name in wanted], chunk_bytes=16)
    for index, chunk in enumerate(cut(tensors, layout)):
        await store.add_chunk(weights, version, index, chunk)
    await store.publish(manifest, layout)
    return manifest


def ticket_of(request: SampleRequest) -> int:
    """The ticket that a request belongs to, or -1 for one of an evaluation."""
    return int(request.request_id[1:].split(".")[0]) if request.request_id.startswith("p") else -1


def _number(ticket_id: int) -> Problem:
    return Problem.of(str(ticket_id), str(ticket_id))


def build(
    directory: Path,
    *,
    steps: int = 4,
    tickets_per_step: int = 2,
    max_staleness: int = 1,
    on_stale: str = "wait",
    redraws: int = 3,
    drop_abandoned: bool = False,
    generation_actors: int = 1,
    slots: int = 8,
    gate: Callable[[SampleRequest], Awaitable[None]] | None = None,
    fail: Callable[[SampleRequest], BaseException | None] | None = None,
    grader: Grader | LimitedGrader = half_right,
    reference: bool = False,
    attempts: int = 2,
    drops_in_a_row: int = 8,
    grading_tickets_per_call: int = 1,
    evaluate_every_steps: int = 0,
    draw: Callable[[int], Problem] = _number,
    publish_timeout_s: float = 10.0,
    other_weights: Sequence[str] = (),
    own_actors: Sequence[Role] = (),
    turns: bool = False,
    journal_in: Folder | None = None,
    recorded: Path | None = None,
    replays_per_step: int = 0,
    epochs: int = 1,
) -> InProcessRun:
    """
    Args:
        recorded: ledger of a run whose recording is replayed.
    """
    store = PolicyStore(keep=2, put=lambda chunk: chunk)

    async def fetch(weights: str, version: int, have: Mapping[str, Content]) -> tuple[Manifest, Layout, Sequence[Any]]:
        if system.before_fetch is not None:
            await system.before_fetch(version)
        delivery = await store.fetch(version, have, weights)
        return delivery.manifest, delivery.layout, delivery.chunks

    engines = [FakeEngine(vocabulary_size=11, gate=gate, fail=fail) for _ in range(generation_actors)]
    others = {name: FakeEngine(vocabulary_size=11) for name in other_weights}
    generation, grading, scoring = Pool("generation"), Pool("grading"), Pool("reference")
    for i, engine in enumerate(engines):
        worker = Generation(f"generation-{i}", {"policy": engine, **others}, Digits(), PARAMS, fetch)
        generation.add(LocalCaller(f"generation-{i}", worker), slots)
    own_pools: dict[Role, Pool] = {role: Pool(role) for role in own_actors}
    for role, pool in own_pools.items():
        engines.append(FakeEngine(vocabulary_size=11, gate=gate, fail=fail))
        worker = Generation(f"{role}-0", {weights_of(role): engines[-1]}, Digits(), PARAMS, fetch)
        pool.add(LocalCaller(f"{role}-0", worker), slots)
    if recorded is not None:
        own_pools[Role.REPLAY] = Pool("replay")
        reader = Replay(Folder(recorded.parent / "journal"), vocabulary=100)
        own_pools[Role.REPLAY].add(LocalCaller("replay-0", reader), 8)
    grading.add(LocalCaller("grading-0", Grading("test", _limited(grader), concurrency=8)), 8)
    scoring.add(LocalCaller("reference-0", Reference(_zero_logps)), 1)
    limits = PipelineLimits(
        attempts, 0.0, 10, 10, 10, 10, 10 if journal_in is None else 90, grading_tickets_per_call, 2
    )
    journal = LocalCaller("journal", Journal(journal_in or directory / "journal"))
    pipeline = Pipeline(generation, grading, scoring if reference else None, journal, limits, _clock(), own_pools)
    ledger = Ledger(directory / "ledger.sqlite")
    settings = CoordinatorSettings(
        seed=0,
        steps=steps,
        group_size=GROUP_SIZE,
        admission=Admission(max_staleness, tickets_per_step - replays_per_step),
        on_stale=on_stale,
        updates=UpdateLimits(attempts=2, retry_delay_s=0.0, sync_timeout_s=10, publish_timeout_s=publish_timeout_s),
        ready_bytes=1 << 30,
        drops_in_a_row=drops_in_a_row,
        evaluate_every_steps=evaluate_every_steps,
        keep_checkpoints=2,
        redraws=redraws,
        drop_abandoned=drop_abandoned,
        turns=turns,
        opponents="opponent" in other_weights or Role.OPPONENT in own_actors,
        replays_per_step=replays_per_step,
    )
    heldout = [draw(9)]
    prompts = Prompts(draw, heldout, heldout)
    replays = None if recorded is None else Replays(ledger, read_recording(recorded), epochs)
    recorder = Recorder(None, _clock())
    coordinator = Coordinator(settings, ledger, prompts, pipeline, recorder, _clock(), replays=replays)
    system = InProcessRun(coordinator, ledger, store, engines, pipeline)
    return system


def _limited(grader: Grader | LimitedGrader) -> LimitedGrader:
    return grader if isinstance(grader, LimitedGrader) else threaded("test", grader)


def _zero_logps(batch: pa.RecordBatch) -> list[Any]:
    return [[0.0] * len(row) for row in batch.column("response_token_ids").to_pylist()]


def _clock() -> Callable[[], float]:
    """Seconds that pass with every look: no test depends on the real time."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.001
        return now

    return clock


async def until(condition: Callable[[], bool]) -> None:
    """Lets the event loop run until a condition holds."""
    while not condition():
        await asyncio.sleep(0.001)


def states(run: InProcessRun) -> Mapping[str, int]:
    return {state: n for state, n in run.ledger.counts().items() if n}


__all__ = ["GROUP_SIZE", "InProcessRun", "Ticket", "build", "half_right", "send", "states", "ticket_of", "until"]
