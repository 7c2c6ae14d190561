"""A stage that never answers is named with its process by whoever looks at the coordinator's snapshot."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.calls import Caller
from deploy.stall import StallWatch
from distrl.messages import Whereabouts
from tests.builders import run
from tests.system.in_process import InProcessRun, build


class Silent:
    """A caller that gives no answer to one method; what it is asked for otherwise is done."""

    def __init__(self, caller: Caller, method: str) -> None:
        self.name = caller.name
        self._caller = caller
        self._method = method

    async def batch(self, method: str, *args: Any, timeout_s: float) -> tuple[Any, Any]:
        await self._hang(method)
        return await self._caller.batch(method, *args, timeout_s=timeout_s)

    async def ask(self, method: str, *args: Any, timeout_s: float) -> Any:
        await self._hang(method)
        return await self._caller.ask(method, *args, timeout_s=timeout_s)

    async def _hang(self, method: str) -> None:
        if method == self._method:
            await asyncio.Event().wait()


def silence(system: InProcessRun, stage: str) -> None:
    pipeline = system.pipeline
    match stage:
        case "journal":
            pipeline._journal = Silent(pipeline._journal, "append")
        case "grading":
            (member,) = pipeline.grading.members
            member.caller = Silent(member.caller, "grade")
        case "reference":
            assert pipeline.reference is not None
            (member,) = pipeline.reference.members
            member.caller = Silent(member.caller, "score")
        case "generation":
            (member,) = pipeline.generation.members
            member.caller = Silent(member.caller, "generate")


async def warning(system: InProcessRun) -> str:
    """What the watch says once nothing moves any more."""
    watch = StallWatch(warning_s=1)
    told, now = None, 0.0
    where = {name: Whereabouts(7, "head", "", 0) for name in ("generation-0", "grading-0", "reference-0", "journal")}
    while told is None:
        for _ in range(50):
            await asyncio.sleep(0.001)
        now += 0.6
        told = watch.look(await system.coordinator.snapshot(-1), now, where)
    return told


@pytest.mark.parametrize("stage", ["grading", "reference", "journal"])
def test_a_stage_that_hangs_is_named_with_its_process(tmp_path: Path, stage: str) -> None:
    async def main() -> None:
        system = build(tmp_path, steps=2, tickets_per_step=1, max_staleness=0, reference=True)
        await system.coordinator.start()
        # The evaluation before training is graded as well: only what comes after it hangs.
        while not system.ledger.evaluations():
            await asyncio.sleep(0.001)
        await system.learn(1)
        silence(system, stage)
        waiting = asyncio.create_task(system.coordinator.next_batch(2))
        told = await warning(system)
        process = "journal" if stage == "journal" else f"{stage}-0"
        words, _, seconds = told.rpartition(" for ")
        assert words.partition(": ")[2] == f"ticket 1 is in {stage} at {process} (process 7 on head)"
        assert seconds.endswith(" s")
        waiting.cancel()

    run(main())


def test_an_evaluation_that_hangs_in_generation_is_named_with_the_process(tmp_path: Path) -> None:
    async def main() -> None:
        system = build(tmp_path, steps=2, tickets_per_step=1, max_staleness=0)
        silence(system, "generation")
        waiting = asyncio.create_task(system.coordinator.next_batch(1))
        await system.coordinator.start()
        told = await warning(system)
        # The ticket of the first step hangs beside it, and is named: without it there would be no step either.
        assert "is in generation at generation-0 (process 7 on head) for " in told
        snapshot = await system.coordinator.snapshot(-1)
        (call,) = snapshot["evaluating"]["calls"]
        assert (snapshot["evaluating"]["name"], call["stage"], call["process"]) == (
            *("before", "generation", "generation-0"),
        )
        waiting.cancel()

    run(main())


def test_weights_that_a_generation_actor_never_gets_are_named(tmp_path: Path) -> None:
    async def main() -> None:
        system = build(tmp_path, steps=3, tickets_per_step=1, max_staleness=0)

        async def never(version: int) -> None:
            await asyncio.Event().wait()

        system.before_fetch = never
        await system.coordinator.start()
        await system.learn(1)
        waiting = asyncio.create_task(system.coordinator.next_batch(2))
        told = await warning(system)
        assert ": generation-0 (process 7 on head) loads policy version 1 for " in told
        waiting.cancel()

    run(main())


def test_a_learner_that_trains_without_end_is_named_with_its_step(tmp_path: Path) -> None:
    async def main() -> None:
        system = build(tmp_path, steps=3, tickets_per_step=1, max_staleness=0)
        await system.coordinator.start()
        await system.coordinator.learner_begins(Whereabouts(9, "head", "", 1))
        await system.coordinator.next_batch(1)
        assert ": the learner (process 9 on head) trains step 1 on 1 tickets, for " in await warning(system)

    run(main())
