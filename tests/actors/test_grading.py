"""Grading: rewards row by row, in threads, and a failure is never a reward."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from actors.grading import Grading
from distrl.errors import StageError
from distrl.rewards import Grade, Grader, make_grader
from distrl.tasks.problem import Problem
from tests.builders import DEADLINE_S, generation_batch, run, threaded

PROBLEMS = {f"prompt-{i}": Problem(f"prompt-{i}", f"{i}>", f"text {i}.0") for i in range(4)}
"""The first response of each ticket is right, see `builders.generation_columns`."""


def clock() -> float:
    return next(TIMES)


TIMES = iter(range(1000, 10**6))


def make(grader: Grader, concurrency: int = 2) -> Grading:
    return Grading("exact", threaded("exact", grader), concurrency, clock)


def test_every_rollout_gets_its_own_grade_and_the_receipt_sums_them_by_ticket() -> None:
    batches = [generation_batch(0, (2, 3)), generation_batch(1, (1, 1, 4))]
    receipt, batch = run(make(make_grader("exact")).grade(PROBLEMS, *batches))

    assert batch.select(["rollout_id", "reward", "verdict", "components", "grader"]).to_pylist() == [
        {
            "rollout_id": rollout_id,
            "reward": reward,
            "verdict": "correct" if reward else "wrong",
            "components": [("exact", reward)],
            "grader": "exact",
        }
        for rollout_id, reward in [("p0.0.0", 1.0), ("p0.0.1", 0.0), ("p1.0.0", 1.0), ("p1.0.1", 0.0), ("p1.0.2", 0.0)]
    ]
    assert (receipt.reward_sums, receipt.correct, receipt.rollouts) == ((1.0, 1.0), (1, 1), (2, 3))
    assert receipt.bytes == batch.nbytes
    assert receipt.started_s < receipt.finished_s
    assert set(batch.column("grading_started_s").to_pylist()) == {receipt.started_s}
    assert set(batch.column("grading_finished_s").to_pylist()) == {receipt.finished_s}


def test_a_partial_reward_is_summed_but_not_counted_as_correct() -> None:
    def half(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        return [Grade(0.5, {"style": 0.25, "fact": 0.25}, "wrong", "half right") for _ in responses]

    receipt, batch = run(make(half).grade(PROBLEMS, generation_batch(2, (1, 1, 1))))
    assert (receipt.reward_sums, receipt.correct) == ((1.5,), (0,))
    assert batch.column("reason").to_pylist() == ["half right"] * 3
    assert batch.column("components").to_pylist() == [[("style", 0.25), ("fact", 0.25)]] * 3


def test_a_slow_ticket_delays_no_other_call() -> None:
    gate, entered = threading.Event(), threading.Event()

    def slow_on_ticket_0(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        if problems[0].prompt_id == "prompt-0":
            entered.set()
            assert gate.wait(DEADLINE_S)
        return [Grade(1.0) for _ in responses]

    async def scenario() -> None:
        grading = make(slow_on_ticket_0, concurrency=2)
        slow = asyncio.create_task(grading.grade(PROBLEMS, generation_batch(0)))
        try:
            await asyncio.to_thread(entered.wait, DEADLINE_S)
            receipt, _ = await grading.grade(PROBLEMS, generation_batch(1), generation_batch(2))
            assert receipt.rollouts == (2, 2)
            assert not slow.done()
        finally:
            gate.set()
        assert (await slow)[0].rollouts == (2,)

    run(scenario())


def test_tickets_of_one_call_are_graded_at_the_same_time() -> None:
    """Each of the two graders waits for the other one to have begun."""
    both = threading.Barrier(2, timeout=DEADLINE_S)

    def meet(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        both.wait()
        return [Grade(float(problems[0].prompt_id[-1])) for _ in responses]

    receipt, _ = run(make(meet, concurrency=2).grade(PROBLEMS, generation_batch(1), generation_batch(3)))
    assert receipt.reward_sums == (2.0, 6.0)


def test_no_more_tickets_are_graded_at_once_than_allowed() -> None:
    lock, running, most = threading.Lock(), 0, 0

    def count(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.005)  # long enough for a third one to come in, if it could
        with lock:
            running -= 1
        return [Grade(0.0) for _ in responses]

    async def scenario() -> None:
        grading = make(count, concurrency=2)
        await asyncio.gather(*(grading.grade(PROBLEMS, generation_batch(i), generation_batch(i + 1)) for i in range(3)))

    run(scenario())
    assert most == 2


def refused(grader: Grader) -> str:
    """What grading says; no batch is returned, not even for the ticket that could be graded."""
    with pytest.raises(StageError) as caught:
        run(make(grader).grade(PROBLEMS, generation_batch(1), generation_batch(2)))
    return str(caught.value)


def test_a_grader_that_raises_is_an_error_with_its_prompt_and_no_reward() -> None:
    divide = make_grader("operator:truediv")  # a function, but not one of three arguments
    with pytest.raises(StageError) as caught:
        run(make(divide).grade(PROBLEMS, generation_batch(2)))
    assert str(caught.value) == (
        "grader operator:truediv failed on prompt prompt-2, rollout p2.0.0: TypeError: truediv expected 2 arguments, "
        "got 3"
    )


def test_a_failed_verdict_is_an_error_and_no_reward() -> None:
    def cannot(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        return [Grade(float("nan"), verdict="failed", reason="no sandbox") for _ in responses]

    message = refused(cannot)
    assert message == "grader exact failed on prompt prompt-1, rollout p1.0.0: no sandbox"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_grades_than_responses_is_an_error(count: int) -> None:
    def miscounts(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        return [Grade(1.0)] * count

    assert refused(miscounts) == f"grader exact: must return one grade per response (2), got {count}"


def test_a_reward_that_is_not_finite_is_refused_with_its_rollout() -> None:
    def infinite(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        return [Grade(1.0), Grade(float("inf"))]

    with pytest.raises(StageError) as caught:
        run(make(infinite).grade(PROBLEMS, generation_batch(3)))
    assert str(caught.value) == (
        "grader exact failed on prompt prompt-3, rollout p3.0.1: reward must be a finite number, got inf"
    )
