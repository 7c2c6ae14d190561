"""Conversations reach the engine through every way that a prompt takes, and the grader as they are."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from distrl.rewards import Grade
from distrl.tasks import Message, Problem
from tests.builders import run
from tests.system.in_process import build, half_right


def _conversation(ticket_id: int) -> Problem:
    # The tokens of a conversation are those of its last message's digits; see `Digits`.
    return Problem.of([Message("system", "Be brief."), Message("user", f"5{ticket_id}")], "")


def test_rollouts_and_evaluations_sample_the_conversation(tmp_path: Path) -> None:
    graded: list[Problem] = []

    def grader(problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        graded.extend(problems)
        return half_right(problems, responses)

    async def scenario() -> None:
        system = build(tmp_path, steps=1, tickets_per_step=1, max_staleness=0, draw=_conversation, grader=grader)
        await system.coordinator.start()
        await system.learn(1)
        await asyncio.wait_for(system.coordinator.done.wait(), 10)
        # "50" is tokens 6 and 1, "59" is 6 and 10.
        (engine,) = system.engines
        assert {request.prompt_token_ids for request in engine.requests} == {(6, 1), (6, 10)}
        assert {problem.messages for problem in graded} == {_conversation(n).messages for n in (0, 9)}

    run(scenario())
