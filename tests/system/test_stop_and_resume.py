"""A run that is stopped goes on where it was: no ticket twice, none lost, the same rollouts when synchronous."""

import asyncio
import errno
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from distrl.audit import Contract, audit
from distrl.errors import LedgerError, RunError
from distrl.ledger import Ledger
from distrl.sampling import SampleRequest
from tests.system.in_process import InProcessRun, build, states, ticket_of, until


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def stop(system: InProcessRun, step: int) -> None:
    """Asks for a stop after `step`; the learner gets no further batch."""
    await system.coordinator.request_stop()
    assert await system.coordinator.next_batch(step + 1) is None
    system.ledger.close()


async def stop_with_a_batch_ready(directory: Path) -> None:
    """A run of three steps that is stopped after the first, with a checkpoint and two tickets in the journal."""
    system = build(directory, steps=3, tickets_per_step=2, max_staleness=1)
    await system.coordinator.start()
    await system.learn(1)
    await system.checkpoint(1, version=1)
    await until(lambda: states(system).get("ready", 0) >= 2)
    await stop(system, 1)


async def rows(system: InProcessRun, steps: range) -> list[Any]:
    """Trains steps and returns the content of their rollouts."""
    found = []
    for step in steps:
        for ticket in (await system.learn(step)).tickets:
            batch = ticket.generation.value
            found.append(batch.select(["rollout_id", "response_token_ids", "behavior_logps"]).to_pydict())
    return found


def test_a_synchronous_run_in_two_parts_trains_the_rollouts_of_the_whole_run(tmp_path: Path) -> None:
    # The fake engine's tokens depend on the version's number, which a resumed run does not reuse: versions 0 to 2 are
    # the same in both, so the parts are cut where the second begins with tickets that are in the journal already.
    async def whole() -> list[Any]:
        system = build(tmp_path / "whole", steps=3, max_staleness=0)
        await system.coordinator.start()
        return await rows(system, range(1, 4))

    async def first() -> list[Any]:
        system = build(tmp_path / "parts", steps=3, max_staleness=0)
        await system.coordinator.start()
        found = await rows(system, range(1, 3))
        await system.checkpoint(2, version=2)
        await until(lambda: states(system) == {"committed": 4, "ready": 2})
        await stop(system, 2)
        return found

    async def second() -> list[Any]:
        system = build(tmp_path / "parts", steps=3, max_staleness=0)
        await system.coordinator.start()
        await system.restore(2)
        found = await rows(system, range(3, 4))
        await system.coordinator.done.wait()
        assert states(system) == {"committed": 4, "trained": 2}
        return found

    assert run(first()) + run(second()) == run(whole())


def test_what_was_being_sampled_is_sampled_again_as_the_same_ticket_and_prompt(tmp_path: Path) -> None:
    async def first() -> None:
        async def never(request: SampleRequest) -> None:
            if ticket_of(request) == 3:
                await asyncio.Event().wait()

        system = build(tmp_path, steps=4, tickets_per_step=2, max_staleness=1, gate=never)
        await system.coordinator.start()
        await system.learn(1)
        await system.checkpoint(1, version=1)
        await until(lambda: states(system).get("issued") == 1 and states(system).get("ready", 0) >= 1)
        await stop(system, 1)

    async def second() -> list[int]:
        system = build(tmp_path, steps=4, tickets_per_step=2, max_staleness=1)
        await system.coordinator.start()
        await system.restore(1)
        trained = [t.ticket_id for step in (2, 3, 4) for t in (await system.learn(step)).tickets]
        await system.coordinator.done.wait()
        row = system.ledger._db.execute("SELECT prompt_id FROM tickets WHERE ticket_id = 3").fetchone()
        assert row[0] == system.coordinator._prompts.draw(3).prompt_id
        return trained

    run(first())
    trained = run(second())
    assert sorted(trained) == [2, 3, 4, 5, 6, 7]


def test_a_run_that_was_evaluated_to_the_end_and_then_died_ends_when_it_is_resumed(tmp_path: Path) -> None:
    """Nobody may wait for an evaluation that the ledger has already."""

    async def first() -> None:
        system = build(tmp_path, steps=2)
        await system.coordinator.start()
        await system.learn(1)
        await system.learn(2)
        await system.coordinator.done.wait()
        await system.checkpoint(2, version=2)
        system.ledger.close()

    async def second() -> list[tuple[str, int]]:
        system = build(tmp_path, steps=2)
        await system.coordinator.start()
        await system.restore(2)
        await system.coordinator.done.wait()
        return [(row["name"], row["step"]) for row in system.ledger.evaluations()]

    run(first())
    assert run(second()) == [("before", 0), ("after", 2)]


def test_staleness_counts_steps_and_publishing_again_adds_none(tmp_path: Path) -> None:
    async def second() -> dict[int, int]:
        system = build(tmp_path, steps=3, tickets_per_step=2, max_staleness=1)
        await system.coordinator.start()
        await system.restore(1)
        grant = await system.coordinator.next_batch(2)
        assert grant is not None
        # Versions: 0, then 1 after step 1, then 2, which are the weights of 1 published again.
        assert sorted(system.ledger.versions()) == [0, 1, 2]
        oldest = {
            t.ticket_id: min(v for row in t.generation.value.column("policy_versions").to_pylist() for v in row)
            for t in grant.tickets
        }
        assert {t.ticket_id: t.staleness for t in grant.tickets} == {
            i: {0: 1, 1: 0, 2: 0}[v] for i, v in oldest.items()
        }
        return oldest

    run(stop_with_a_batch_ready(tmp_path))
    run(second())


def test_a_damaged_journal_file_ends_the_resume_with_its_name(tmp_path: Path) -> None:
    async def second() -> tuple[str, str]:
        system = build(tmp_path, steps=3, tickets_per_step=2, max_staleness=1)
        with Path(named).open("r+b") as file:
            file.write(b"X")
        await system.coordinator.start()
        await until(lambda: system.coordinator._outcome.fatal is not None)
        return str(system.coordinator._outcome.fatal), named

    run(stop_with_a_batch_ready(tmp_path))
    ledger = Ledger(tmp_path / "ledger.sqlite")
    query = "SELECT journal_file FROM tickets WHERE state = 'ready' ORDER BY ticket_id LIMIT 1"
    named = ledger._db.execute(query).fetchone()[0]
    ledger.close()
    message, name = run(second())
    assert message.startswith(f"journal file {name}: must have sha256 ")
    assert message.endswith("; the file was damaged")


def test_a_learner_restored_to_another_step_than_the_ledgers_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=3)
        await system.coordinator.start()
        await system.learn(1)
        await system.checkpoint(1, version=1)
        await stop(system, 1)
        again = build(tmp_path, steps=3)
        await again.coordinator.start()
        with pytest.raises(RunError) as error:
            await again.coordinator.restored(2)
        assert str(error.value) == "the learner must go on from step 1, the ledger's last checkpoint, got 2"

    run(scenario())


def test_the_ledger_does_not_go_back_behind_a_committed_checkpoint(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=3)
        await system.coordinator.start()
        await system.learn(1)
        await system.checkpoint(1, version=1)
        with pytest.raises(LedgerError) as error:
            system.ledger.roll_back(0)
        assert str(error.value) == "the ledger has a checkpoint of step 1, it cannot go back to step 0"

    run(scenario())


def test_tickets_trained_after_the_checkpoint_are_ready_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=3, tickets_per_step=2)
        await system.coordinator.start()
        await system.learn(1)
        await system.checkpoint(1, version=1)
        second = [t.ticket_id for t in (await system.learn(2)).tickets]
        assert {kept.ticket_id for kept in system.ledger.roll_back(1)} == set(second)
        assert states(system)["committed"] == 2
        assert "trained" not in states(system)

    run(scenario())


async def learn_on(system: InProcessRun, step: int) -> None:
    while True:
        await system.learn(step)
        step += 1


def test_a_full_disk_ends_the_run_drops_no_ticket_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def first() -> str:
        system = build(tmp_path, steps=3, tickets_per_step=2)
        await system.coordinator.start()
        await system.learn(1)
        await system.checkpoint(1, version=1)
        with monkeypatch.context() as patched:
            patched.setattr("distrl.storage.os.fsync", full)
            with pytest.raises(RunError) as error:
                await learn_on(system, 2)
        assert "dropped" not in states(system)
        system.ledger.close()
        return str(error.value)

    async def second() -> list[int]:
        system = build(tmp_path, steps=3, tickets_per_step=2)
        await system.coordinator.start()
        await system.restore(1)
        trained = [t.ticket_id for step in (2, 3) for t in (await system.learn(step)).tickets]
        await system.coordinator.done.wait()
        assert states(system) == {"committed": 2, "trained": 4}
        return trained

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = run(first())
    assert message.startswith(f"journal file {tmp_path}/journal/")
    assert message.endswith(
        ".arrow: cannot be written: No space left on device; make room, then go on with distrl resume"
    )
    assert len(set(run(second()))) == 4


@pytest.mark.parametrize("drop", [False, True])
def test_rollouts_of_weights_that_were_left_are_trained_or_sampled_again_as_the_run_wants(
    tmp_path: Path, drop: bool
) -> None:
    async def scenario() -> None:
        system = build(tmp_path, steps=6, tickets_per_step=1, max_staleness=2, slots=2, drop_abandoned=drop)
        await system.coordinator.start()
        await system.learn(1)
        await system.checkpoint(1, version=1)
        for step in (2, 3):
            await system.learn(step)
        # Some that wait were sampled by versions 2 and 3, which a learner that goes back to step 1 has left.
        await until(lambda: states(system).get("ready", 0) >= 1 and not system.pipeline.generation.busy)
        by = "SELECT DISTINCT ticket_id FROM ticket_versions JOIN tickets USING (ticket_id) WHERE version IN (2, 3)"
        left = {r["ticket_id"] for r in system.ledger.rows(by)}
        assert left
        await system.restore(1)
        trained = {}
        for step in range(2, 7):
            grant = await system.learn(step)
            trained |= {t.ticket_id: t.staleness for t in grant.tickets}
        given_up = {r["ticket_id"] for r in system.ledger.rows("SELECT * FROM returns WHERE cause = 'abandoned'")}
        assert (given_up == left) if drop else (not given_up)
        await system.coordinator.done.wait()
        await system.checkpoint(6, version=max(system.ledger.versions()))
        system.ledger.close()
        found = audit(tmp_path / "ledger.sqlite", Contract(1, 2, finished=True, drop_abandoned=drop))
        assert found.violations == ()
        assert (found.off_branch_tickets == 0) is drop
        if not drop:  # and a run that had promised to train none of them would be found out
            strict = audit(tmp_path / "ledger.sqlite", Contract(1, 2, finished=True, drop_abandoned=True))
            assert {v.rule for v in strict.violations} == {"staleness"}

    run(scenario())
