"""Whatever a grader does, its limits hold, and what it did not say is never a reward."""

import asyncio
import os
import threading
from collections.abc import Sequence

import pytest

from distrl.errors import StageError
from distrl.graders.combined import CombinedGrader
from distrl.graders.grade import Grade, Response
from distrl.graders.limited import LimitedGrader, Limits
from distrl.graders.process import ProcessPool
from distrl.tasks import Problem
from tests.builders import DEADLINE_S, run, threaded

PROBLEM = Problem("prompt-0", "0>", "5")
PROCESS = "tests.graders.users_graders:process"


def rewards(grades: Sequence[Grade]) -> list[float]:
    return [grade.reward for grade in grades]


def failure(grader: LimitedGrader, responses: Sequence[str]) -> str:
    with pytest.raises(StageError) as caught:
        run(grader.grade([PROBLEM] * len(responses), responses))
    return str(caught.value)


def test_a_thread_that_hangs_is_given_up_and_its_late_answer_counts_for_nothing() -> None:
    gate, answered = threading.Event(), threading.Event()

    def hangs(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        if responses[0] == "hang":
            assert gate.wait(DEADLINE_S)
            answered.set()
        return [Grade(1.0) for _ in responses]

    async def scenario() -> None:
        grader = threaded("slow", hangs, timeout_s=0.05, concurrency=1)
        with pytest.raises(StageError) as caught:
            await grader.grade([PROBLEM], ["hang"])
        assert str(caught.value) == "grader slow failed on prompt prompt-0: it must answer within timeout_s = 0.05 s"
        assert rewards(await grader.grade([PROBLEM], ["x"])) == [1.0]
        gate.set()
        assert await asyncio.to_thread(answered.wait, DEADLINE_S)
        await asyncio.sleep(0)
        assert rewards(await grader.grade([PROBLEM], ["y"])) == [1.0]

    run(scenario())


def test_threads_that_hang_are_bounded_and_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrl.graders.thread.MOST_LOST", 2)
    gate = threading.Event()

    def hangs(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        gate.wait(DEADLINE_S)
        return [Grade(1.0) for _ in responses]

    async def scenario() -> None:
        grader = threaded("slow", hangs, timeout_s=0.01)
        for _ in range(2):
            with pytest.raises(StageError, match="must answer within"):
                await grader.grade([PROBLEM], ["x"])
        with pytest.raises(StageError) as caught:
            await grader.grade([PROBLEM], ["x"])
        assert str(caught.value) == (
            "grader slow: at most 2 of its calls may hang at a time; give it processes of its own, which can be "
            "killed: set processes in its section of reward.graders"
        )

    run(scenario())
    gate.set()


def test_a_process_that_hangs_or_dies_is_replaced_and_costs_only_that_response() -> None:
    async def scenario() -> None:
        pool = ProcessPool(PROCESS, {}, processes=1)
        grader = LimitedGrader("process", pool, Limits(timeout_s=2.0))
        try:
            (first,) = await grader.grade([PROBLEM], ["x"])
            assert first.reward != os.getpid()
            with pytest.raises(StageError) as caught:
                await grader.grade([PROBLEM], [Response("hang", "p0.0.1")])
            assert str(caught.value) == (
                f"grader {PROCESS} failed on prompt prompt-0, rollout p0.0.1: it must answer within timeout_s = 2 s; "
                "its process was killed"
            )
            (second,) = await grader.grade([PROBLEM], ["x"])
            assert second.reward != first.reward
            with pytest.raises(StageError) as caught:
                await grader.grade([PROBLEM], ["die"])
            assert str(caught.value) == (f"grader {PROCESS} failed on prompt prompt-0: its process died with status 3")
            with pytest.raises(StageError, match="MemoryError"):
                await grader.grade([PROBLEM], ["grow"])
            (third,) = await grader.grade([PROBLEM], ["x"])
            assert third.reward not in (first.reward, second.reward)
            with pytest.raises(ProcessLookupError):
                os.kill(int(second.reward), 0)
        finally:
            grader.close()

    run(scenario())


def test_attempts_are_counted_and_bounded() -> None:
    calls = 0

    def fails_twice(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise ValueError("not yet")
        return [Grade(1.0)]

    assert failure(threaded("late", fails_twice, attempts=2), ["x"]) == "grader late failed: ValueError: not yet"
    calls = 0
    assert rewards(run(threaded("late", fails_twice, attempts=3).grade([PROBLEM], ["x"]))) == [1.0]


def test_a_cache_knows_problem_response_and_version() -> None:
    graded: list[str] = []

    def record(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        graded.extend(f"{p.prompt_id} {r}" for p, r in zip(problems, responses, strict=True))
        return [Grade(float(r)) for r in responses]

    async def scenario() -> None:
        grader = threaded("record", record, cached=2)
        assert rewards(await grader.grade([PROBLEM] * 4, ["1", "2", "1", "2"])) == [1.0, 2.0, 1.0, 2.0]
        assert graded == ["prompt-0 1", "prompt-0 2"]
        other = Problem("prompt-1", "1>", "5")
        assert rewards(await grader.grade([PROBLEM, other], ["2", "2"])) == [2.0, 2.0]
        assert graded[2:] == ["prompt-1 2"]
        # Two are kept: the one that was used longest ago is forgotten.
        assert rewards(await grader.grade([PROBLEM], ["1"])) == [1.0]
        assert graded[3:] == ["prompt-0 1"]

    run(scenario())


def test_a_failure_is_not_cached() -> None:
    answers = iter([ValueError("broken"), 1.0])

    def once(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return [Grade(answer)]

    async def scenario() -> None:
        grader = threaded("once", once, cached=10)
        with pytest.raises(StageError):
            await grader.grade([PROBLEM], ["x"])
        assert rewards(await grader.grade([PROBLEM], ["x"])) == [1.0]

    run(scenario())


@pytest.mark.parametrize("reward", [1.5, -0.5])
def test_a_reward_out_of_range_is_refused_with_its_rollout(reward: float) -> None:
    grader = threaded("wild", lambda problems, responses: [Grade(reward)], range=(0.0, 1.0))
    assert failure(grader, [Response("x", "p3.0.1")]) == (
        f"grader wild failed on prompt prompt-0, rollout p3.0.1: reward must be from 0 to 1, got {reward}"
    )


def test_several_graders_are_summed_by_weight_and_the_first_one_gives_the_verdict() -> None:
    right = threaded("right", lambda p, r: [Grade(1.0, {"right": 1.0}, "correct", "so it is")])
    style = threaded("style", lambda p, r: [Grade(0.5, {"short": 0.25, "calm": 0.25}, "wrong", "so so")])
    noted = threaded("noted", lambda p, r: [Grade(7.0)])
    combined = CombinedGrader([("right", 1.0, right), ("style", 0.2, style), ("noted", 0.0, noted)])
    (grade,) = run(combined.grade([PROBLEM], ["x"]))
    assert grade == Grade(
        1.0 + 0.2 * 0.5,
        {"right": 1.0, "style": 0.5, "style.short": 0.25, "style.calm": 0.25, "noted": 7.0},
        "correct",
        "so it is",
    )


def test_one_grader_that_fails_fails_the_ticket_whatever_its_weight() -> None:
    right = threaded("right", lambda p, r: [Grade(1.0)])
    broken = threaded("broken", lambda p, r: [Grade(float("nan"))])
    with pytest.raises(StageError) as caught:
        run(CombinedGrader([("right", 1.0, right), ("broken", 0.0, broken)]).grade([PROBLEM], ["x"]))
    assert str(caught.value) == ("grader broken failed on prompt prompt-0: reward must be a finite number, got nan")
