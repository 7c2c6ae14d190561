"""Who is sampled from which weights, on which actors: evaluations, the reference model, opponents."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from actors.beside import Beside
from actors.pipeline import TicketFailedError
from distrl.messages import BatchGrant
from distrl.sampling import SampleRequest
from distrl.schema import Role
from distrl.tasks import Problem
from distrl.tickets import weights_of
from tests.system.in_process import InProcessRun, build, states, ticket_of, until


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 20))


def beside(system: InProcessRun) -> Beside:
    return Beside(system.pipeline, seed=0, clock=lambda: 0.0)


def test_every_role_has_weights() -> None:
    assert {role: weights_of(role) for role in Role} == {
        Role.POLICY: "policy",
        Role.EVALUATION: "policy",
        Role.OPPONENT: "opponent",
        Role.REFERENCE: "reference",
        Role.REPLAY: "policy",  # of the run that recorded it
    }


def test_the_reference_and_an_opponent_are_sampled_on_the_actors_of_the_policy(tmp_path: Path) -> None:
    """Three engines in one actor: the policy moves on, the anchor is a version of it, the reference stays."""

    async def scenario() -> None:
        system = build(tmp_path, steps=3, tickets_per_step=2, max_staleness=0, other_weights=("opponent", "reference"))
        await system.coordinator.start()
        await system.learn(1)
        await system.learn(2)
        await system.publish_as("opponent", version=1, step=1)
        (member,) = system.pipeline.generation.members
        await until(lambda: member.others.get("opponent") == 1 and member.version == 2)

        problem = Problem.of("7", "7")
        versions = {}
        for role in (Role.REFERENCE, Role.OPPONENT, Role.EVALUATION):
            sampled = await beside(system).sample(role, 0, problem, responses=3)
            batch = sampled.flight.generation.value
            assert set(batch.column("role").to_pylist()) == {role}
            assert batch.column("rollout_id").to_pylist() == [f"{role[0]}0.0.{g}" for g in range(3)]
            versions[role] = (sampled.receipt.oldest_version, sampled.receipt.newest_version)
        assert versions == {Role.REFERENCE: (0, 0), Role.OPPONENT: (1, 1), Role.EVALUATION: (2, 2)}
        # None of them is a ticket of the ledger, and none holds the next step up.
        await system.learn(3)
        assert states(system) == {"trained": 6}
        assert system.ledger.max_staleness() == 0

    run(scenario())


def test_the_same_ticket_of_a_role_gets_the_same_responses_and_another_role_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, other_weights=("opponent", "reference"))

        async def tokens(role: Role) -> Any:
            sampled = await beside(system).sample(role, 5, Problem.of("3", "3"), responses=2)
            return sampled.flight.generation.value.column("response_token_ids").to_pylist()

        # All engines hold version 0 of the fake model: what differs is the noise.
        drawn = {role: await tokens(role) for role in (Role.REFERENCE, Role.OPPONENT, Role.EVALUATION)}
        assert {role: await tokens(role) for role in drawn} == drawn
        assert len({repr(one) for one in drawn.values()}) == 3

    run(scenario())


def test_a_role_whose_weights_nobody_holds_is_refused_by_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, attempts=1)
        with pytest.raises(TicketFailedError) as caught:
            await beside(system).sample(Role.OPPONENT, 0, Problem.of("1", "1"), responses=1)
        assert caught.value.detail == (
            "generation-0 must hold the weights 'opponent' to sample from them, it has policy; "
            "start it with those weights"
        )

    run(scenario())


def test_a_role_with_actors_of_its_own_is_sampled_there_and_nowhere_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        system = build(tmp_path, own_actors=(Role.REFERENCE,))
        policy, reference = system.engines
        await beside(system).sample(Role.REFERENCE, 4, Problem.of("1", "1"), responses=8)
        assert [r.request_id for r in reference.requests] == ["r4.0"]
        assert policy.requests == []

    run(scenario())


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_an_evaluation_with_actors_of_its_own_stops_no_training_and_stays_at_its_version(
    tmp_path: Path, max_staleness: int
) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        evaluating = asyncio.Event()

        async def hold_evaluations(request: SampleRequest) -> None:
            if ticket_of(request) < 0 and system.engines[1].version == 2:
                evaluating.set()
                await gate.wait()

        system = build(
            tmp_path,
            steps=6,
            tickets_per_step=2,
            max_staleness=max_staleness,
            evaluate_every_steps=2,
            own_actors=(Role.EVALUATION,),
            gate=hold_evaluations,
        )
        await system.coordinator.start()
        await system.learn(1)
        await system.learn(2)
        await evaluating.wait()
        # The evaluation of step 2 is held; training goes on over the steps 3 to 5 all the same.
        for step in (3, 4, 5):
            assert isinstance(await system.learn(step), BatchGrant)
        assert system.engines[0].version >= 4 - max_staleness
        assert system.engines[1].version == 2
        gate.set()
        await system.learn(6)
        await system.coordinator.done.wait()
        rows = [(e["name"], e["step"], e["oldest_version"], e["newest_version"]) for e in system.ledger.evaluations()]
        assert rows[0] == ("before", 0, 0, 0)
        assert ("during", 2, 2, 2) in rows
        assert ("after", 6, 6, 6) in rows
        assert all(oldest == newest == step for _, step, oldest, newest in rows)
        # Nothing was sampled for training by the actor that evaluates, and the reverse.
        assert all(ticket_of(r) < 0 for r in system.engines[1].requests)
        assert all(ticket_of(r) >= 0 for r in system.engines[0].requests)

    run(scenario())
