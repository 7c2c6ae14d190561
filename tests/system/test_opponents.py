"""Tickets that meet opponents: sampled from anchor weights, compared, drawn again where an actor dies."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from actors.grading import Grading
from distrl.errors import RunError, StageError
from distrl.judges import FunctionJudge
from distrl.messages import BatchGrant
from distrl.preferences import Comparison
from distrl.sampling import SampleRequest
from distrl.schema import Role
from distrl.tasks import Problem
from tests.builders import run
from tests.system.in_process import InProcessRun, build, states, until


def beats(first: str, second: str, answer: str, metadata: Mapping[str, object]) -> float:
    """The larger number as text wins, sometimes."""
    return 0.5 if first == second else (0.75 if first > second else 0.25)


def system(directory: Path, opponents: int = 2, prefer: Any = beats, **changes: Any) -> InProcessRun:
    made = build(directory, own_actors=(Role.OPPONENT,), **{"max_staleness": 1, **changes})
    for member in made.pipeline.grading.members:
        grading: Grading = member.caller._worker  # type: ignore[attr-defined]
        comparison = Comparison("beats", FunctionJudge(prefer), False, 1.0, parallel=2)
        grading._comparison, grading._opponents = comparison, opponents
    return made


def test_every_rollout_has_the_mean_preference_against_its_tickets_opponents(tmp_path: Path) -> None:
    seen: dict[int, list[str]] = {}

    async def play() -> None:
        made = system(tmp_path)
        await made.coordinator.start()
        grant = await made.learn(1)
        for ticket in grant.tickets:
            graded = ticket.grading.value.to_pylist()
            generated = ticket.generation.value.to_pylist()
            assert {row["role"] for row in generated} == {"policy"}
            by_id = {row["rollout_id"]: row for row in graded}
            own = [by_id[row["rollout_id"]]["preference"] for row in generated]
            # Two responses, each against both opponents: means of two values out of 1/4, 1/2 and 3/4.
            assert all(p in (0.25, 0.375, 0.5, 0.625, 0.75) for p in own)
            seen[ticket.ticket_id] = [row["text"] for row in generated]
        assert states(made)["trained"] == 2

    run(play())
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (1.5, ", rollouts p0.0.0 and o0.0.0: it must be a probability in [0, 1], got 1.5"),
        (
            0.75,
            ": P(first beats second) + P(second beats first) must be 1, got 0.75 + 0.75 for rollouts p0.0.0 and "
            "o0.0.0; mend the function, or set preference.symmetrize to take the mean of both positions",
        ),
    ],
)
def test_a_function_that_is_no_preference_ends_the_run_with_the_pair(tmp_path: Path, answer: float, cause: str) -> None:
    async def play() -> str:
        # One ticket at a time: of two, both may have failed before the first one's failure ends the run.
        alone = {"tickets_per_step": 1, "max_staleness": 0}
        made = system(tmp_path, opponents=1, prefer=lambda *_: answer, attempts=1, drops_in_a_row=0, **alone)
        await made.coordinator.start()
        with pytest.raises(RunError) as caught:
            await made.coordinator.next_batch(1)
        assert states(made)["dropped"] == 1
        return str(caught.value)

    assert run(play()) == (
        "limits.drops_in_a_row: at most 0 tickets may be dropped with none becoming ready between them, got 1; the "
        f"last cause was grading_failed: preference beats on prompt {Problem.of('0', '0').prompt_id}{cause}"
    )


def test_opponents_are_drawn_again_with_the_same_noise_when_their_actor_fails(tmp_path: Path) -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []

    def fail(request: SampleRequest) -> BaseException | None:
        if not request.request_id.startswith("o"):
            return None
        asked.append((request.request_id, request.stream))
        first = sum(name == request.request_id for name, _ in asked) == 1
        return StageError("the process is gone") if first else None

    async def play() -> None:
        made = system(tmp_path, fail=fail)
        await made.coordinator.start()
        await made.learn(1)
        assert "dropped" not in states(made)

    run(play())
    names = {name for name, _ in asked}
    for name in names:
        streams = [stream for other, stream in asked if other == name]
        assert len(streams) >= 1
        assert len(set(streams)) == 1
    assert any(sum(other == name for other, _ in asked) == 2 for name in names)


def test_new_opponents_are_sampled_once_their_weights_are_published(tmp_path: Path) -> None:
    async def play() -> None:
        made = system(tmp_path)
        await made.coordinator.start()
        await made.learn(1)
        await made.publish_as("opponent", version=1, step=1)
        pool = made.pipeline.pool_of(Role.OPPONENT)
        await until(lambda: pool.members[0].others.get("opponent") == 1)

    run(play())


def test_opponents_of_a_synchronous_run_wait_for_the_newest_weights(tmp_path: Path) -> None:
    sampled_by: list[tuple[str, int]] = []

    async def play() -> None:
        fetching, loads = asyncio.Event(), asyncio.Event()

        def look(request: SampleRequest) -> None:
            if request.request_id.startswith("o"):
                sampled_by.append((request.request_id, made.engines[-1].version))

        async def hold_the_first(version: int) -> None:
            made.before_fetch = None
            fetching.set()
            await loads.wait()

        made = system(tmp_path, max_staleness=0, fail=look)
        await made.coordinator.start()
        grant = await made.coordinator.next_batch(1)
        assert isinstance(grant, BatchGrant)
        version = await made.report(grant)
        await until(made.coordinator._may_load.is_set)  # the first evaluation is over
        made.before_fetch = hold_the_first
        await made.publish_as("opponent", version, step=1)
        await fetching.wait()
        await made.publish(version, step=1)
        # The policy's responses are there, and their opponents are not asked for.
        await until(lambda: states(made).get("generated") == 2)
        assert {held for _, held in sampled_by} == {0}
        assert len(sampled_by) == 2
        loads.set()
        await made.learn(2)

    run(play())
    assert [held for _, held in sampled_by] == [0, 0, 1, 1]


def test_a_run_that_goes_on_without_publishing_its_anchor_ends_with_the_cause(tmp_path: Path) -> None:
    async def first() -> None:
        made = system(tmp_path)
        await made.coordinator.start()
        await made.learn(1)
        await made.checkpoint(1, version=1)
        await made.coordinator.request_stop()
        assert await made.coordinator.next_batch(2) is None
        made.ledger.close()

    async def second() -> tuple[str, int]:
        made = system(tmp_path)
        await made.coordinator.start()
        version = await made.coordinator.restored(1)
        with pytest.raises(RunError) as caught:
            await made.publish(version, 1)
        return str(caught.value), version

    run(first())
    message, version = run(second())
    assert message == (
        f"the learner must publish the weights opponent of its checkpoint before policy version {version}, got none; "
        "tickets would meet the model that the run began with"
    )
