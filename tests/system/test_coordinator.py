"""The schedule of a run, with the real stages in one process and gates that fix what happens in which order."""

import asyncio
import random
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from distrl.errors import RunError, StageError
from distrl.rewards import Grade
from distrl.sampling import SampleRequest
from distrl.tasks import Problem
from tests.system.in_process import build, half_right, states, ticket_of, until


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 20))


def test_a_run_trains_every_ticket_once_and_ends_with_both_evaluations(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=4, tickets_per_step=2)
        await system.coordinator.start()
        trained = [t.ticket_id for step in range(1, 5) for t in (await system.learn(step)).tickets]
        await system.coordinator.done.wait()
        assert sorted(trained) == list(range(8))
        assert states(system) == {"trained": 8}
        assert [e["name"] for e in system.ledger.evaluations()] == ["before", "after"]
        assert [(e["oldest_version"], e["newest_version"]) for e in system.ledger.evaluations()] == [(0, 0), (4, 4)]

    run(scenario())


def test_a_straggling_generation_call_delays_neither_grading_nor_training_of_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def hold_ticket_0(request: SampleRequest) -> None:
            if ticket_of(request) == 0:
                await gate.wait()

        system = build(tmp_path, steps=3, tickets_per_step=2, max_staleness=2, gate=hold_ticket_0)
        await system.coordinator.start()
        first, second = await system.learn(1), await system.learn(2)
        trained_before_the_straggler = {t.ticket_id for grant in (first, second) for t in grant.tickets}
        assert trained_before_the_straggler == {1, 2, 3, 4}
        gate.set()
        last = await system.learn(3)
        assert {t.ticket_id: t.staleness for t in last.tickets} == {0: 2, 5: pytest.approx(1, abs=1)}

    run(scenario())


def test_a_step_waits_for_the_straggler_that_it_would_make_too_old(tmp_path: Path) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def hold_ticket_0(request: SampleRequest) -> None:
            if ticket_of(request) == 0:
                await gate.wait()

        system = build(tmp_path, steps=4, tickets_per_step=2, max_staleness=1, gate=hold_ticket_0)
        await system.coordinator.start()
        await system.learn(1)
        step_2 = asyncio.create_task(system.coordinator.next_batch(2))
        # Everything else is ready, and ticket 0 would be two steps old after this step.
        await until(lambda: states(system).get("ready", 0) >= 2)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not step_2.done()
        gate.set()
        grant = await step_2
        assert 0 in {t.ticket_id for t in grant.tickets}
        assert max(t.staleness for t in grant.tickets) == 1

    run(scenario())


def test_on_stale_redraw_draws_the_straggler_again_with_other_noise_and_the_same_prompt(tmp_path: Path) -> None:
    async def scenario() -> None:
        never = asyncio.Event()
        draws: list[str] = []

        async def hold_the_first_draw_of_ticket_0(request: SampleRequest) -> None:
            if ticket_of(request) == 0 and request.request_id not in draws:
                draws.append(request.request_id)
            if request.request_id == "p0.0":
                await never.wait()

        system = build(
            tmp_path,
            steps=4,
            tickets_per_step=2,
            max_staleness=1,
            on_stale="redraw",
            slots=6,
            gate=hold_the_first_draw_of_ticket_0,
        )
        await system.coordinator.start()
        trained: dict[int, int] = {}
        for step in (1, 2, 3, 4):
            grant = await system.learn(step)
            trained |= {t.ticket_id: t.staleness for t in grant.tickets}
            rows = {t.ticket_id: t.generation.value.column("redraw").to_pylist() for t in grant.tickets}
            assert rows.get(0, [1, 1]) == [1, 1]
        assert trained[0] <= 1
        assert draws == ["p0.0", "p0.1"]
        assert system.pipeline.generation.busy == 0  # the places of the aborted draw are free again
        (row,) = system.ledger.rows("SELECT * FROM returns WHERE cause = 'redrawn'")
        assert (row["ticket_id"], row["redraw"], row["old_state"]) == (0, 0, "issued")
        noise = [tuple(r) for r in system.ledger.rows("SELECT redraw, prompt_id FROM tickets WHERE ticket_id = 0")]
        assert noise == [(1, Problem.of("0", "0").prompt_id)]

    run(scenario())


def test_a_ticket_that_is_late_in_every_draw_is_dropped_with_that_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        never = asyncio.Event()

        async def hold_ticket_0(request: SampleRequest) -> None:
            if ticket_of(request) == 0:
                await never.wait()

        system = build(
            tmp_path,
            steps=8,
            tickets_per_step=2,
            max_staleness=1,
            on_stale="redraw",
            redraws=2,
            slots=6,
            gate=hold_ticket_0,
        )
        await system.coordinator.start()
        for step in range(1, 9):
            await system.learn(step)
        (row,) = system.ledger.rows("SELECT * FROM tickets WHERE drop_reason = 'too_stale'")
        assert (row["ticket_id"], row["redraw"]) == (0, 2)
        assert row["drop_detail"] == "ticket 0 was not ready in time in 3 draws (limits.redraws = 2)"
        await system.coordinator.done.wait()
        assert states(system)["trained"] == 16

    run(scenario())


def test_on_stale_keep_trains_the_straggler_whenever_it_comes_and_records_its_age(tmp_path: Path) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def hold_ticket_0(request: SampleRequest) -> None:
            if ticket_of(request) == 0:
                await gate.wait()

        system = build(tmp_path, steps=4, tickets_per_step=2, max_staleness=1, on_stale="keep", gate=hold_ticket_0)
        await system.coordinator.start()
        for step in (1, 2, 3):
            await system.learn(step)
        gate.set()
        last = await system.learn(4)
        assert {t.ticket_id: t.staleness for t in last.tickets}[0] == 3
        assert system.ledger.max_staleness() == 3

    run(scenario())


@pytest.mark.parametrize("order_seed", [1, 2, 3])
def test_synchronous_batches_are_in_ticket_order_however_calls_complete(tmp_path: Path, order_seed: int) -> None:
    """The rollouts of a batch are the same, bit by bit, with two actors and completions in any order."""

    async def scenario(directory: Path, shuffle: random.Random | None) -> list[list[Any]]:
        async def gate(request: SampleRequest) -> None:
            for _ in range(shuffle.randrange(40) if shuffle else 0):
                await asyncio.sleep(0)

        system = build(directory, steps=3, tickets_per_step=4, max_staleness=0, generation_actors=2, slots=4, gate=gate)
        await system.coordinator.start()
        batches = []
        for step in (1, 2, 3):
            grant = await system.learn(step)
            assert [t.ticket_id for t in grant.tickets] == list(range(4 * step - 4, 4 * step))
            assert all(t.staleness == 0 for t in grant.tickets)
            batches.append([_content(t.generation.value) for t in grant.tickets])
        return batches

    plain = asyncio.run(asyncio.wait_for(scenario(tmp_path / "plain", None), 20))
    shuffled = asyncio.run(asyncio.wait_for(scenario(tmp_path / "shuffled", random.Random(order_seed)), 20))
    assert shuffled == plain


def _content(batch: pa.RecordBatch) -> Any:
    return batch.select(["rollout_id", "response_token_ids", "behavior_logps", "policy_versions"]).to_pydict()


def test_a_sequence_that_spans_versions_is_as_old_as_its_oldest_token(tmp_path: Path) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def hold_ticket_2(request: SampleRequest) -> None:
            if ticket_of(request) == 2:
                await gate.wait()

        system = build(tmp_path, steps=3, tickets_per_step=2, max_staleness=2, slots=6, gate=hold_ticket_2)
        await system.coordinator.start()
        await system.learn(1)
        await until(lambda: system.engines[0].version == 1)
        gate.set()
        await until(lambda: system.ledger.state(2) == "ready")
        batch = {t.ticket_id: t for t in (await system.learn(2)).tickets}[2]
        versions = [v for row in batch.generation.value.column("policy_versions").to_pylist() for v in row]
        assert set(versions) == {0, 1}
        assert batch.staleness == 1

    run(scenario())


def test_no_weights_are_loaded_before_the_first_evaluation_has_ended(tmp_path: Path) -> None:
    """It must be of the model before training, though tickets are sampled and trained beside it."""

    async def scenario() -> None:
        gate = asyncio.Event()

        async def hold_evaluation(request: SampleRequest) -> None:
            if ticket_of(request) == -1:
                await gate.wait()

        system = build(tmp_path, steps=3, tickets_per_step=2, max_staleness=1, gate=hold_evaluation)
        await system.coordinator.start()
        await system.learn(1)
        for _ in range(100):
            await asyncio.sleep(0)
        assert system.engines[0].version == 0
        gate.set()
        await until(lambda: system.engines[0].version == 1)
        (before,) = system.ledger.evaluations()
        assert (before["oldest_version"], before["newest_version"]) == (0, 0)

    run(scenario())


def test_a_synchronous_run_samples_no_tickets_beside_an_evaluation(tmp_path: Path) -> None:
    async def scenario() -> None:
        gates = {1: asyncio.Event()}
        evaluations: list[int] = []

        async def hold_evaluation(request: SampleRequest) -> None:
            if ticket_of(request) == -1:
                evaluations.append(0)
                if len(evaluations) == 2:
                    await gates[1].wait()

        system = build(
            tmp_path, steps=3, tickets_per_step=2, max_staleness=0, gate=hold_evaluation, evaluate_every_steps=1
        )
        await system.coordinator.start()
        await system.learn(1)
        await until(lambda: len(evaluations) == 2)
        for _ in range(100):
            await asyncio.sleep(0)
        assert states(system) == {"trained": 2}
        gates[1].set()
        assert [t.ticket_id for t in (await system.learn(2)).tickets] == [2, 3]
        versions = [(e["oldest_version"], e["newest_version"]) for e in system.ledger.evaluations()]
        assert versions[:2] == [(0, 0), (1, 1)]

    run(scenario())


def test_a_run_that_was_stopped_at_its_last_step_only_has_its_last_evaluation_to_do(tmp_path: Path) -> None:
    async def first() -> None:
        system = build(tmp_path, steps=1, tickets_per_step=2)
        await system.coordinator.start()
        await system.learn(1)
        await system.checkpoint(1, version=1)
        await system.coordinator.request_stop()
        system.ledger.close()

    async def second() -> None:
        system = build(tmp_path, steps=1, tickets_per_step=2)
        await system.coordinator.start()
        await system.restore(1)
        await system.coordinator.done.wait()
        assert system.ledger.evaluations()[-1]["name"] == "after"
        assert states(system) == {"committed": 2}

    run(first())
    run(second())


def test_a_grader_that_fails_drops_the_ticket_with_its_cause_and_never_gives_a_reward(tmp_path: Path) -> None:
    def refuse_prompt_1(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        if problems[0].prompt == "1":
            raise StageError("the grader cannot read prompt 1")
        return half_right(problems, responses)

    async def scenario() -> None:
        system = build(tmp_path, steps=2, tickets_per_step=2, grader=refuse_prompt_1, grading_tickets_per_call=2)
        await system.coordinator.start()
        trained = [t.ticket_id for step in (1, 2) for t in (await system.learn(step)).tickets]
        await system.coordinator.done.wait()
        assert 1 not in trained
        assert len(set(trained)) == 4
        assert system.ledger.drops()["grading_failed"] == 1
        row = system.ledger._db.execute("SELECT attempts, drop_detail, reward_mean FROM tickets WHERE ticket_id = 1")
        assert tuple(row.fetchone()) == (2, "the grader cannot read prompt 1", None)
        # Two attempts failed, and after the first another one was made.
        assert (await system.coordinator.snapshot(-1))["retries"]["grading"] == 1

    run(scenario())


def test_a_call_that_fails_once_is_made_again_and_the_ticket_is_trained(tmp_path: Path) -> None:
    failed: list[int] = []

    def fail_once(request: SampleRequest) -> BaseException | None:
        if ticket_of(request) == 0 and not failed:
            failed.append(0)
            return StageError("the engine hiccupped")
        return None

    async def scenario() -> None:
        system = build(tmp_path, steps=1, tickets_per_step=2, fail=fail_once)
        await system.coordinator.start()
        assert {t.ticket_id for t in (await system.learn(1)).tickets} == {0, 1}
        row = system.ledger._db.execute("SELECT attempts FROM tickets WHERE ticket_id = 0").fetchone()
        assert row[0] == 1
        retries = (await system.coordinator.snapshot(-1))["retries"]
        assert retries == {"generation": 1, "grading": 0, "journal": 0}

    run(scenario())


def test_a_run_in_which_nothing_can_be_graded_ends_with_the_cause(tmp_path: Path) -> None:
    def broken(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        if problems[0].prompt == "9":  # the held-out problem
            return half_right(problems, responses)
        raise StageError("the grader is broken")

    async def scenario() -> None:
        system = build(tmp_path, steps=1, grader=broken, drops_in_a_row=3, attempts=1)
        await system.coordinator.start()
        with pytest.raises(RunError) as error:
            await system.coordinator.next_batch(1)
        assert str(error.value) == (
            "limits.drops_in_a_row: at most 3 tickets may be dropped with none becoming ready between them, got 4; "
            "the last cause was grading_failed: the grader is broken"
        )
        assert (await system.coordinator.snapshot(-1))["failed"] == f"RunError: {error.value}"

    run(scenario())


def test_a_fault_of_our_own_ends_the_run_instead_of_vanishing(tmp_path: Path) -> None:
    def bug(request: SampleRequest) -> BaseException | None:
        return ZeroDivisionError("a bug") if ticket_of(request) == 0 else None

    async def scenario() -> None:
        system = build(tmp_path, steps=1, fail=bug)
        await system.coordinator.start()
        with pytest.raises(RunError) as error:
            await system.coordinator.next_batch(1)
        assert str(error.value) == "the coordinator failed: ZeroDivisionError: a bug"

    run(scenario())


def test_a_slow_grading_call_does_not_delay_the_grading_of_others(tmp_path: Path) -> None:
    release = threading.Event()

    def hold_prompt_0(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        if problems[0].prompt == "0":
            assert release.wait(10)
        return half_right(problems, responses)

    async def scenario() -> None:
        system = build(tmp_path, steps=2, tickets_per_step=2, max_staleness=2, grader=hold_prompt_0)
        await system.coordinator.start()
        trained = {t.ticket_id for t in (await system.learn(1)).tickets}
        assert len(trained) == 2
        assert 0 not in trained
        release.set()
        assert 0 in {t.ticket_id for t in (await system.learn(2)).tickets}

    run(scenario())


def test_reference_columns_come_with_the_batch_only_where_reference_actors_run(tmp_path: Path) -> None:
    async def scenario(directory: Path, reference: bool) -> Any:
        system = build(directory, steps=1, reference=reference)
        await system.coordinator.start()
        return (await system.learn(1)).tickets[0].reference

    assert asyncio.run(scenario(tmp_path / "without", False)) is None
    assert asyncio.run(scenario(tmp_path / "with", True)).value.num_rows >= 2


def test_no_more_tickets_are_issued_than_the_window_and_generation_says_that_it_is_held(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=10, tickets_per_step=2, max_staleness=3, slots=4)
        await system.coordinator.start()
        await until(lambda: states(system).get("ready", 0) >= 2 and system.pipeline.generation.busy == 0)
        for _ in range(50):
            await asyncio.sleep(0)
        assert sum(states(system).values()) <= (3 + 1) * 2
        assert (await system.coordinator.snapshot(-1))["generation_held"]

    run(scenario())


def test_a_learner_that_asks_for_steps_out_of_order_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path)
        with pytest.raises(RunError) as error:
            await system.coordinator.next_batch(2)
        assert str(error.value) == "the learner must ask for step 1 next, got 2"

    run(scenario())
