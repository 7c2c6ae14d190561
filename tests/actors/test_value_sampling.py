"""Stage 1 of A*-PO: the noise is the prompt's own, what is done is kept, and a failure is no reward."""

import asyncio
from pathlib import Path

import pyarrow as pa
import pytest

from actors.value_sampling import Prompt, ValueSampler, noise_stream
from deploy.vstar import collect
from distrl.errors import StageError
from distrl.sampling import SampleRequest
from distrl.schema import Role
from distrl.tasks import Problem
from distrl.values_table import Parts, PromptRewards, TableKey, prompt_sha256
from tests.builders import run
from tests.system.in_process import Digits, build

KEY = TableKey("reference", "test", 2, 1.0, 4, 0)
PROMPTS = [Prompt(Problem.of(str(n), str(n)), prompt_sha256(Digits().encode(str(n)))) for n in range(6)]


async def read(reference: object) -> pa.RecordBatch:
    return reference.value  # type: ignore[attr-defined]


def sampler(directory: Path, **stages: object) -> ValueSampler:
    own = {Role.REFERENCE}
    system = build(directory, grading_tickets_per_call=3, own_actors=own, **stages)  # type: ignore[arg-type]
    return ValueSampler(system.pipeline, 0, 2, read, lambda: 0.0)


async def sampled(sampler: ValueSampler, prompts: list[Prompt], table: Path) -> dict[str, PromptRewards]:
    parts = Parts(table, KEY)
    parts.open()
    return await collect(sampler, prompts, parts, lambda done: None)


def test_the_noise_of_a_prompt_depends_on_seed_and_tokens_alone(tmp_path: Path) -> None:
    streams: dict[str, tuple[int, ...]] = {}

    async def note(request: SampleRequest) -> None:
        assert streams.setdefault(str(request.prompt_token_ids), request.stream) == request.stream

    run(sampled(sampler(tmp_path, gate=note), PROMPTS, tmp_path / "a"))
    run(sampled(sampler(tmp_path, gate=note), PROMPTS[::-1], tmp_path / "b"))
    assert len(set(streams.values())) == len(PROMPTS)
    assert streams[str(Digits().encode("3"))] == noise_stream(0, PROMPTS[3].sha256)
    assert noise_stream(1, PROMPTS[3].sha256) != noise_stream(0, PROMPTS[3].sha256)


def test_rewards_are_those_of_the_prompts_own_responses(tmp_path: Path) -> None:
    """Calls to the grader are shared by three prompts; the fake grader calls every second response right."""
    found = run(sampled(sampler(tmp_path), PROMPTS, tmp_path / "a"))
    assert {row.rewards for row in found.values()} == {(0.0, 1.0)}
    assert {(row.prompt_id, row.prompt_sha256) for row in found.values()} == {
        (p.problem.prompt_id, p.sha256) for p in PROMPTS
    }
    assert {row.correct for row in found.values()} == {1}


def test_a_sampling_that_is_cancelled_leaves_what_was_done_and_the_rest_comes_out_the_same(tmp_path: Path) -> None:
    whole = run(sampled(sampler(tmp_path / "1"), PROMPTS, tmp_path / "whole"))

    async def stopped() -> None:
        started = asyncio.Event()

        async def gate(request: SampleRequest) -> None:
            if request.prompt_token_ids == Digits().encode("4"):
                started.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(sampled(sampler(tmp_path / "2", gate=gate, slots=2), PROMPTS, tmp_path / "parts"))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(stopped())
    kept = Parts(tmp_path / "parts", KEY).open()
    assert 3 <= len(kept) <= 4  # the last one before may still be in grading
    missing = [p for p in PROMPTS if p.problem.prompt_id not in kept]
    rest = run(sampled(sampler(tmp_path / "3"), missing, tmp_path / "parts"))
    assert kept | rest == whole


def test_a_prompt_that_fails_is_told_and_the_others_are_kept(tmp_path: Path) -> None:
    def fail(request: SampleRequest) -> BaseException | None:
        return StageError("no luck") if request.prompt_token_ids == Digits().encode("2") else None

    with pytest.raises(StageError) as caught:
        run(sampled(sampler(tmp_path, fail=fail), PROMPTS, tmp_path / "a"))
    assert str(caught.value) == (
        "1 of 6 prompts could not be sampled and graded, the last cause was generation_failed: no luck; the others are "
        "kept: call distrl vstar again when the cause is mended"
    )
    assert len(Parts(tmp_path / "a", KEY).open()) == 5
