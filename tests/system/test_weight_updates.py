"""Weight updates through the real coordinator: lost weights come again, nobody waits beyond a deadline, and an actor
that cannot keep up samples nothing new."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from actors.policy_store import PolicyStore
from distrl.errors import DeadlineError, RunError
from distrl.messages import BatchGrant, PublishAgain, Whereabouts
from distrl.sampling import LoadReport, SampleRequest
from tests.system.in_process import InProcessRun, build, ticket_of, until


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 20))


def forget(store: PolicyStore) -> None:
    """What a restart does to the store."""
    store.__init__(2, lambda chunk: chunk)  # type: ignore[misc]


def events(system: InProcessRun, kind: str) -> list[str]:
    return [r["message"] for r in system.coordinator._recorder.after(-1) if r["kind"] == kind]


def test_a_store_that_lost_everything_is_filled_again_by_the_learner(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=3, tickets_per_step=2, max_staleness=0)
        lost = asyncio.Event()

        async def lose(version: int) -> None:
            if version == 1:
                forget(system.store)
                lost.set()

        system.before_fetch = lose
        await system.coordinator.start()
        await system.learn(1)
        # The learner waits for step 2, which needs weights that nobody has any more: it is asked for them again.
        again = await system.coordinator.next_batch(2)
        assert again == PublishAgain(version=1, step=1)
        assert lost.is_set()
        system.before_fetch = None
        await system.publish(1, 1)
        grant = await system.coordinator.next_batch(2)
        assert isinstance(grant, BatchGrant)
        assert [t.staleness for t in grant.tickets] == [0, 0]
        assert events(system, "published_again") == ["policy version 1: the policy store had lost it"]
        assert events(system, "failed_call") == [
            "generation-0 pulling policy version 1: generation-0 keeps policy version 0: policy version 1 must be in "
            "the store, which has none; pull the newest"
        ]
        assert len(system.ledger.versions()) == 2  # filling the store makes no version

    run(scenario())


def test_a_batch_is_granted_before_the_last_step_is_published_and_counts_as_a_step_staler(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=3, tickets_per_step=2, max_staleness=1)
        await system.coordinator.start()
        first = await system.coordinator.next_batch(1)
        assert isinstance(first, BatchGrant)
        version = await system.report(first)
        second = await system.coordinator.next_batch(2)
        assert isinstance(second, BatchGrant)
        assert [t.staleness for t in (*first.tickets, *second.tickets)] == [0, 0, 1, 1]
        seen = await system.coordinator.snapshot(-1)
        assert (seen["publishing"]["version"], seen["granted"], seen["step"]) == (1, 2, 0)
        assert seen["learner"]["does"] == "trains step 2 on 2 tickets"
        await system.publish(version, 1)
        seen = await system.coordinator.snapshot(-1)
        # It trains on: what it had been given is still in its hands.
        assert (seen["publishing"], seen["granted"], seen["step"]) == (None, 2, 1)
        assert seen["learner"]["does"] == "trains step 2 on 2 tickets"
        (published,) = [r for r in seen["records"] if r["kind"] == "published"]
        assert (published["version"], published["step"]) == (1, 1)
        assert published["publish_s"] >= 0
        await system.finish_step(second)
        assert {v.version: v.parent for v in system.ledger.versions().values()} == {0: None, 1: 0, 2: 1}
        assert [t.staleness for t in (await system.learn(3)).tickets] in ([0, 0], [1, 1])

    run(scenario())


def test_a_learner_that_publishes_newer_weights_is_not_asked_for_lost_ones(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=4, tickets_per_step=2, max_staleness=1)
        may_be_lost = asyncio.Event()

        async def lose(version: int) -> None:
            if version == 1:
                await may_be_lost.wait()
                forget(system.store)

        system.before_fetch = lose
        await system.coordinator.start()
        await system.learn(1)
        second = await system.coordinator.next_batch(2)
        assert isinstance(second, BatchGrant)
        version = await system.report(second)
        may_be_lost.set()
        await until(lambda: system.coordinator._updates.refill_wanted)
        # It has the weights of step 2 now, and those of step 1 are the ones that were lost.
        asked = asyncio.create_task(system.coordinator.next_batch(3))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not asked.done()
        await system.publish(version, 2)
        third = await asked
        assert isinstance(third, BatchGrant)
        assert not system.coordinator._updates.refill_wanted

    run(scenario())


def test_a_publication_of_a_learner_that_was_replaced_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=3, tickets_per_step=2)
        await system.coordinator.start()
        old = (await system.coordinator.learner_begins(Whereabouts(1, "here", "", 1))).session
        await system.learn(1)
        await system.coordinator.learner_begins(Whereabouts(2, "here", "", 2))
        with pytest.raises(RunError) as caught:
            await system.coordinator.published(2, 2, "0" * 64, session=old)
        assert str(caught.value) == "this learner process was replaced by another one and must end"
        assert system.coordinator._versions.published.version == 1

    run(scenario())


def test_an_actor_that_never_gets_the_weights_ends_the_run_with_its_name_and_the_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=3, tickets_per_step=2, max_staleness=0)

        async def lose(version: int) -> None:
            forget(system.store)

        system.before_fetch = lose
        await system.coordinator.start()
        await system.learn(1)
        assert await system.coordinator.next_batch(2) == PublishAgain(version=1, step=1)
        await system.publish(1, 1)
        with pytest.raises(DeadlineError) as caught:
            await system.coordinator.next_batch(2)
        assert str(caught.value) == (
            "generation-0 must load policy version 1 in at most 2 attempts; the last error was: generation-0 keeps "
            "policy version 0: policy version 1 must be in the store, which has none; pull the newest"
        )

    run(scenario())


def test_a_learner_that_stops_between_a_step_and_its_publication_ends_the_run_with_the_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=3, tickets_per_step=2, publish_timeout_s=0.05)
        await system.coordinator.start()
        grant = await system.coordinator.next_batch(1)
        assert isinstance(grant, BatchGrant)
        assert await system.report(grant) == 1
        await until(lambda: bool(events(system, "failed")))
        with pytest.raises(DeadlineError) as caught:
            await system.coordinator.next_batch(2)
        assert str(caught.value) == (
            "the learner must publish policy version 1 within limits.publish_timeout_s = 0.05 s of its step, "
            "it did not; look at the log of its process"
        )

    run(scenario())


def test_a_publication_in_time_ends_its_clock(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=1, tickets_per_step=2, publish_timeout_s=0.05)
        await system.coordinator.start()
        await system.learn(1)
        await asyncio.sleep(0.1)  # twice the time that it had
        system.coordinator._outcome.check()

    run(scenario())


def test_an_actor_that_cannot_keep_up_samples_nothing_new_while_the_others_go_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=6, tickets_per_step=2, max_staleness=1, generation_actors=2, slots=4)
        slow, quick = system.engines
        gate = asyncio.Event()
        load = slow.load

        async def held(*arguments: Any, **options: Any) -> LoadReport:
            await gate.wait()
            return await load(*arguments, **options)

        slow.load = held  # type: ignore[method-assign]
        await system.coordinator.start()
        for step in range(1, 5):
            grant = await system.learn(step)
            assert max(t.staleness for t in grant.tickets) <= 1
        # Version 0 may not sample what step 3 or a later one trains: those tickets are 4, 5 and up, in order of issue.
        late = [_ticket(r) for r in slow.requests if _ticket(r) >= 4]
        assert (slow.version, late) == (0, [])
        assert {_ticket(r) for r in quick.requests} >= {4, 5, 6, 7}
        gate.set()
        await until(lambda: slow.version > 0)
        for step in (5, 6):
            await system.learn(step)
        await system.coordinator.done.wait()

    run(scenario())


def _ticket(request: SampleRequest) -> int:
    return ticket_of(request)
