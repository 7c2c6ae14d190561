"""Replayed tickets in a run of one process: who is needed, what they meet, and how it ends when they run out."""

import asyncio
from pathlib import Path

import pytest

from actors.calls import WorkerLostError
from distrl.audit import Contract, audit
from distrl.errors import RunError
from distrl.schema import Role
from tests.builders import run
from tests.recorded import small_recording
from tests.system.in_process import InProcessRun, build, states, until


def offline(tmp_path: Path, **changes: object) -> InProcessRun:
    """Two steps of two replayed tickets, of a recording that has four."""
    recorded = small_recording(tmp_path / "recorded", tickets=4)
    settings: dict[str, object] = {"steps": 2, "generation_actors": 0, "replays_per_step": 2, "recorded": recorded}
    return build(tmp_path, **{**settings, "own_actors": [Role.EVALUATION], **changes})  # type: ignore[arg-type]


def test_an_offline_run_evaluates_with_actors_of_its_own_and_needs_no_others(tmp_path: Path) -> None:
    async def main() -> None:
        system = offline(tmp_path, reference=True)
        assert system.pipeline.generation.members == []
        await system.coordinator.start()
        for step in (1, 2):
            grant = await system.coordinator.next_batch(step)
            assert grant is not None
            assert [t.staleness for t in grant.tickets] == [None, None]
            assert all(t.reference is not None for t in grant.tickets)  # scored here, not as recorded
            version = await system.report(grant)
            await system.publish(version, step)
            await system.checkpoint(step, version)
        await system.coordinator.done.wait()
        assert [row["name"] for row in system.ledger.evaluations()] == ["before", "after"]
        assert states(system) == {"committed": 4}
        found = audit(tmp_path / "ledger.sqlite", Contract(2, 1, finished=True, replays_per_step=2))
        assert found.violations == ()
        assert (found.replayed, found.staleness) == ({"recorded": 4}, {})

    run(main())


def test_the_audit_finds_a_batch_with_another_part_and_a_ticket_that_is_replayed_more_often(tmp_path: Path) -> None:
    async def main() -> None:
        system = offline(tmp_path, steps=4, epochs=2)
        await system.coordinator.start()
        for step in range(1, 5):
            await system.learn(step)
        rules = Contract(2, 1, finished=False, replays_per_step=1, replay_epochs=1)
        found = {(v.rule, v.detail) for v in audit(tmp_path / "ledger.sqlite", rules).violations}
        assert ("batches", "step 1 must have trained 1 replayed tickets, got 2") in found
        assert ("replays", "ticket 1 of recorded is replayed in pass 2, replay.epochs is 1") in found
        assert len(found) == 4 + 4

    run(main())


def test_a_recording_that_runs_out_ends_the_run_and_says_so(tmp_path: Path) -> None:
    """As after a drop: the config's check has counted, and every ticket is asked for."""

    async def main() -> str:
        system = offline(tmp_path, steps=3)

        async def learn() -> None:
            for step in (1, 2, 3):
                await system.learn(step)

        await system.coordinator.start()
        with pytest.raises(RunError) as caught:
            await learn()
        return str(caught.value)

    assert run(main()) == (
        "replay.epochs must be at least 2, got 1: the 4 tickets of the recording recorded were all replayed, and there "
        "is none left in place of one that was dropped; raise it in the run's config.yaml, then go on with distrl "
        "resume"
    )


def test_a_damaged_recording_ends_the_run_and_drops_nothing(tmp_path: Path) -> None:
    async def main() -> str:
        system = offline(tmp_path)
        file = tmp_path / "recorded/journal/0.arrow"
        file.write_bytes(file.read_bytes()[:-7])
        await system.coordinator.start()
        with pytest.raises(RunError) as caught:
            await system.coordinator.next_batch(1)
        assert states(system).keys() == {"issued"}
        return str(caught.value)

    message = run(main())
    assert message.startswith(
        f"replay.journal: {tmp_path}/recorded/journal/0.arrow must hold the rollouts of recorded "
    )
    assert message.endswith("; the file was damaged; put the file back as it was, then go on with distrl resume")


class Dead:
    """A caller whose process is gone."""

    name = "replay-0"

    async def batch(self, method: str, *args: object, timeout_s: float) -> tuple[object, object]:
        raise WorkerLostError(f"{self.name}.{method}: the process is gone")

    async def ask(self, method: str, *args: object, timeout_s: float) -> object:
        raise WorkerLostError(f"{self.name}.{method}: the process is gone")


def test_a_reader_that_died_is_told_to_the_supervisor_and_another_one_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        system = offline(tmp_path, attempts=3)
        (member,) = system.pipeline.own_pools[Role.REPLAY].members
        living, member.caller = member.caller, Dead()
        await system.coordinator.start()
        await until(lambda: not system.pipeline.own_pools[Role.REPLAY].members)
        assert (await system.coordinator.snapshot(-1))["lost"] == {"replay-0": "replay-0.generate: the process is gone"}
        living.name = "replay-0.1"
        await system.coordinator.join("replay", living, 8)
        grants = [await system.learn(step) for step in (1, 2)]
        assert [[t.ticket_id for t in grant.tickets] for grant in grants] == [[0, 1], [2, 3]]
        assert system.ledger.drops() == {}

    run(main())


def test_a_mixed_step_waits_for_a_straggler_of_the_sampled_part_alone(tmp_path: Path) -> None:
    """The replayed ones of later steps are ready long before, and are not trained in its place."""

    async def main() -> None:
        hold = asyncio.Event()

        async def gate(request: object) -> None:
            if str(getattr(request, "request_id", "")).startswith("p"):
                await hold.wait()

        recorded = small_recording(tmp_path / "recorded", tickets=4)
        system = build(tmp_path, steps=2, gate=gate, recorded=recorded, replays_per_step=1)
        await system.coordinator.start()
        asked = asyncio.create_task(system.coordinator.next_batch(1))
        await until(lambda: states(system).get("ready", 0) == 2)
        assert not asked.done()
        hold.set()
        grant = await asked
        assert grant is not None
        assert [(t.ticket_id, t.staleness) for t in grant.tickets] == [(0, None), (1, 0)]

    run(main())
