"""What the fake engine offers to other tests, beyond being an engine."""

import asyncio

import pytest

from actors.engines.fake import FakeEngine
from distrl.errors import StageError
from distrl.sampling import SampleRequest
from tests.builders import run
from tests.engines.tiny import request


class Gates:
    """One gate per request, by its id."""

    def __init__(self) -> None:
        self._gates: dict[str, asyncio.Event] = {}

    def __getitem__(self, name: str) -> asyncio.Event:
        return self._gates.setdefault(name, asyncio.Event())

    async def __call__(self, request: SampleRequest) -> None:
        await self[request.request_id].wait()


def test_gates_decide_which_request_is_answered_first() -> None:
    async def scenario() -> list[str]:
        gates, answered = Gates(), []
        engine = FakeEngine(gate=gates)

        async def ask(name: str) -> None:
            await engine.sample(request(name))
            answered.append(name)

        async with asyncio.TaskGroup() as tasks:
            first, second = tasks.create_task(ask("first")), tasks.create_task(ask("second"))
            await asyncio.sleep(0)
            gates["second"].set()
            await second
            gates["first"].set()
            await first
        assert [r.request_id for r in engine.requests] == ["first", "second"]
        return answered

    assert run(scenario()) == ["second", "first"]


def test_weights_that_arrive_at_the_gate_give_responses_that_span_versions() -> None:
    async def scenario() -> None:
        gates = Gates()
        engine = FakeEngine(gate=gates, eos_token_id=-1)
        sampling = asyncio.create_task(engine.sample(request("r", responses=3, max_new_tokens=4)))
        await asyncio.sleep(0)
        report = await engine.load(6, {})
        assert report.sequences_in_flight == 3
        gates["r"].set()
        assert [s.versions for s in await sampling] == [[0, 6, 6, 6]] * 3
        assert (await engine.load(7, {})).sequences_in_flight == 0
        assert engine.loads == [6, 7]

    run(scenario())


def test_a_request_fails_with_the_error_that_was_ordered_for_it() -> None:
    async def scenario() -> None:
        engine = FakeEngine(fail=lambda r: StageError("no luck") if r.request_id == "bad" else None)
        assert len(await engine.sample(request("good"))) == 2
        with pytest.raises(StageError, match=r"^no luck$"):
            await engine.sample(request("bad"))

    run(scenario())


def test_closing_fails_a_request_that_waits_at_its_gate() -> None:
    async def scenario() -> None:
        gates = Gates()
        engine = FakeEngine(gate=gates)
        sampling = asyncio.create_task(engine.sample(request("r")))
        await asyncio.sleep(0)
        await engine.close()
        gates["r"].set()
        with pytest.raises(StageError, match=r"^generation engine: closed; start another one$"):
            await sampling

    run(scenario())


def test_tokens_do_not_depend_on_the_process() -> None:
    # Written down from one run: `hash()` of a string, which differs from process to process, would not repeat it.
    [sample] = run(FakeEngine().sample(request(responses=1, max_new_tokens=3)))
    assert sample.token_ids == [9, 15, 17]
