"""A run whose grader misbehaves on one ticket goes on, its ledger is clean, and no reward is invented."""

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from distrl.graders.grade import Grade, Response
from distrl.tasks import Problem
from tests.builders import threaded
from tests.system.in_process import build, half_right, states, until

BAD = "3"
"""Prompt of the ticket that cannot be graded; the others are half right."""

GATE = threading.Event()
"""Never set: whoever waits for it hangs for good, in a thread that ends with the process."""


def hang(responses: Sequence[Response]) -> list[Grade]:
    GATE.wait()
    return [Grade(1.0) for _ in responses]


def die(responses: Sequence[Response]) -> list[Grade]:
    raise SystemExit(3)


def one_too_few(responses: Sequence[Response]) -> list[Grade]:
    return [Grade(1.0)] * (len(responses) - 1)


def one_too_many(responses: Sequence[Response]) -> list[Grade]:
    return [Grade(1.0)] * (len(responses) + 1)


def not_a_number(responses: Sequence[Response]) -> list[Grade]:
    return [Grade(float("nan")) for _ in responses]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (hang, "grader test failed on prompt {}: it must answer within timeout_s = 0.2 s"),
        (die, "grader test failed: SystemExit: 3"),
        (one_too_few, "grader test: must return one grade per response (2), got 1"),
        (one_too_many, "grader test: must return one grade per response (2), got 3"),
        (not_a_number, "grader test failed on prompt {}, rollout p3.0.0: reward must be a finite number, got nan"),
    ],
)
def test_the_run_goes_on_without_the_ticket(
    tmp_path: Path, fault: Callable[[Sequence[Response]], list[Grade]], cause: str
) -> None:
    def grade(problems: Sequence[Problem], responses: Sequence[Response]) -> Sequence[Grade]:
        return fault(responses) if problems[0].prompt == BAD else half_right(problems, responses)

    async def scenario() -> None:
        grader = threaded("test", grade, timeout_s=0.2)  # type: ignore[arg-type]
        system = build(tmp_path, steps=4, tickets_per_step=2, grader=grader, grading_tickets_per_call=2)
        await system.coordinator.start()
        trained = [t.ticket_id for step in range(1, 5) for t in (await system.learn(step)).tickets]
        await system.coordinator.done.wait()
        await until(lambda: "dropped" in states(system))
        assert len(trained) == len(set(trained)) == 8
        assert 3 not in trained
        assert states(system)["trained"] == 8
        reasons = system.ledger.drops()
        assert reasons["grading_failed"] == 1
        with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
            row = ledger.execute("select drop_detail from tickets where ticket_id = 3").fetchone()
        assert cause.format(Problem.of(BAD, BAD).prompt_id) in row[0]

    asyncio.run(asyncio.wait_for(scenario(), 20))
