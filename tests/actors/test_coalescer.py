"""The coalescer: several tickets to a call, and one that fails spends nobody else's attempts."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from actors.calls import LocalCaller
from actors.coalescer import Coalescer
from actors.pool import Member, Pool
from distrl.errors import DistrlError, StageError
from tests.builders import run


class Stage:
    """Answers calls when its gate is open; a call with a poisoned ticket fails as a whole."""

    def __init__(self, poison: Sequence[str] = (), error: BaseException | None = None) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls: list[list[str]] = []
        self.under_way = 0
        self.most_under_way = 0
        self._poison = set(poison)
        self._error = error or StageError("poisoned")

    async def __call__(self, member: Member, jobs: Sequence[Any]) -> tuple[list[Any], Any]:
        self.calls.append(list(jobs))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await self.gate.wait()
        self.under_way -= 1
        if self._poison & set(jobs):
            raise self._error
        return [job.upper() for job in jobs], f"batch of {','.join(jobs)}"


def make(stage: Any, *, limit: int, capacities: Sequence[int] = (1,)) -> tuple[Coalescer, Pool]:
    pool = Pool("grading")
    for i, capacity in enumerate(capacities):
        pool.add(LocalCaller(f"grading-{i}", object()), capacity)
    return Coalescer(pool, limit, stage), pool


async def submit_all(coalescer: Coalescer, jobs: str) -> list[Any]:
    return await asyncio.gather(*(coalescer.submit(job) for job in jobs), return_exceptions=True)


def test_a_single_ticket_is_not_made_to_wait_for_others() -> None:
    async def scenario() -> None:
        stage = Stage()
        coalescer, pool = make(stage, limit=4)
        assert await coalescer.submit("a") == ("A", "batch of a")
        assert stage.calls == [["a"]]
        assert pool.busy == 0

    run(scenario())


def test_what_waits_for_a_free_place_shares_a_call_up_to_the_limit() -> None:
    async def scenario() -> None:
        stage = Stage()
        stage.gate.clear()
        coalescer, pool = make(stage, limit=3)
        answers = asyncio.create_task(submit_all(coalescer, "abcdefgh"))
        while not stage.calls:
            await asyncio.sleep(0)
        stage.gate.set()

        parts = [part for part, _ in await answers]
        assert parts == list("ABCDEFGH")  # each its own part
        assert stage.calls == [["a"], ["b", "c", "d"], ["e", "f", "g"], ["h"]]
        assert (stage.most_under_way, pool.busy) == (1, 0)

    run(scenario())


def test_as_many_calls_run_as_there_are_places() -> None:
    async def scenario() -> None:
        stage = Stage()
        stage.gate.clear()
        coalescer, pool = make(stage, limit=2, capacities=(2, 1))
        answers = asyncio.create_task(submit_all(coalescer, "abcdef"))
        while len(stage.calls) < 3:
            await asyncio.sleep(0)
        assert pool.busy == 3
        stage.gate.set()
        await answers
        assert (stage.most_under_way, pool.busy) == (3, 0)

    run(scenario())


@pytest.mark.parametrize("places", [1, 3])
def test_a_poison_ticket_alone_gets_the_error(places: int) -> None:
    """At one place the retried tickets wait for the place that the failed call gives back: no deadlock."""

    async def scenario() -> None:
        stage = Stage(poison="c")
        stage.gate.clear()
        coalescer, pool = make(stage, limit=4, capacities=(places,))
        answers = asyncio.create_task(submit_all(coalescer, "xyzabcd" if places == 3 else "xabcd"))
        while len(stage.calls) < places:
            await asyncio.sleep(0)
        stage.gate.set()
        found = await answers

        assert [str(a) for a in found if isinstance(a, BaseException)] == ["poisoned"]
        assert isinstance(found[-2], StageError)
        assert sorted(a[0] for a in found if isinstance(a, tuple)) == sorted("XYZABD" if places == 3 else "XABD")
        assert stage.calls[places:] == [["a", "b", "c", "d"], ["a"], ["b"], ["c"], ["d"]]
        assert pool.busy == 0

    run(scenario())


def test_tickets_behind_a_retry_share_their_own_call() -> None:
    async def scenario() -> None:
        stage = Stage(poison="b")
        stage.gate.clear()
        coalescer, _ = make(stage, limit=2)
        answers = asyncio.create_task(submit_all(coalescer, "xabcd"))
        while not stage.calls:
            await asyncio.sleep(0)
        stage.gate.set()
        await answers
        assert stage.calls == [["x"], ["a", "b"], ["a"], ["b"], ["c", "d"]]

    run(scenario())


def test_a_ticket_that_failed_alone_is_called_once_and_its_submitter_decides() -> None:
    async def scenario() -> None:
        stage = Stage(poison="a")
        coalescer, _ = make(stage, limit=4)
        for _ in range(2):
            with pytest.raises(StageError, match=r"^poisoned$"):
                await coalescer.submit("a")
        assert stage.calls == [["a"], ["a"]]

    run(scenario())


def test_a_fault_that_is_not_ours_reaches_everybody_in_the_call_at_once() -> None:
    async def scenario() -> None:
        stage = Stage(poison="b", error=ZeroDivisionError("a fault of the caller"))
        stage.gate.clear()
        coalescer, pool = make(stage, limit=4)
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # the task's error is logged
        answers = asyncio.create_task(submit_all(coalescer, "xabc"))
        while not stage.calls:
            await asyncio.sleep(0)
        stage.gate.set()
        found = await answers

        assert [type(a) for a in found] == [tuple] + [ZeroDivisionError] * 3
        assert stage.calls == [["x"], ["a", "b", "c"]]
        assert pool.busy == 0
        assert await coalescer.submit("d") == ("D", "batch of d")  # the stage goes on

    run(scenario())


def test_a_call_that_answers_for_too_few_tickets_fails_and_leaves_nobody_waiting() -> None:
    class Forgetful(Stage):
        async def __call__(self, member: Member, jobs: Sequence[Any]) -> tuple[list[Any], Any]:
            parts, batch = await super().__call__(member, jobs)
            return (parts[:-1], batch) if len(jobs) > 1 or jobs[0] == "c" else (parts, batch)

    async def scenario() -> None:
        stage = Forgetful()
        stage.gate.clear()
        coalescer, pool = make(stage, limit=4)
        answers = asyncio.create_task(submit_all(coalescer, "abc"))
        while not stage.calls:
            await asyncio.sleep(0)
        stage.gate.set()
        first, second, third = await answers
        assert (first[0], second[0]) == ("A", "B")
        assert str(third) == "grading-0 must answer for each of 1 tickets, got 0 answers"
        assert isinstance(third, DistrlError)
        assert pool.busy == 0

    run(scenario())


def test_a_submitter_that_gives_up_disturbs_nobody() -> None:
    async def scenario() -> None:
        stage = Stage()
        stage.gate.clear()
        coalescer, pool = make(stage, limit=4)
        tasks = [asyncio.create_task(coalescer.submit(job)) for job in "xabc"]
        while not stage.calls:
            await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[2].cancel()
        stage.gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [a[0] if isinstance(a, tuple) else type(a).__name__ for a in found] == [
            "CancelledError",
            "A",
            "CancelledError",
            "C",
        ]
        assert pool.busy == 0

    run(scenario())
