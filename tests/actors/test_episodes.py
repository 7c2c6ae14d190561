"""Episodes with the real engine: masks, log-probabilities, versions, limits, and environments that fail."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.environments import EnvironmentHost
from actors.episodes import EpisodeLimits, Episodes, Trajectory
from actors.generation import Generation
from distrl.environments.protocol import Step
from distrl.errors import DeadlineError, StageError
from distrl.sampling import SampleRequest, SamplingParams
from distrl.weights import policy_tensors
from tests.actors.scripted import PROBLEM, Letters, Scripted, host, limits
from tests.builders import DEADLINE_S, make_ticket, run
from tests.engines.tiny import StepGate, full_logps, tiny_engine, tiny_model


def request(budget: int, responses: int = 1) -> SampleRequest:
    return SampleRequest("p0.0", (5, 6, 7), responses, SamplingParams(budget), (0, 1, 0, 0))


def play(make: Callable[[], Any], budget: int, bounds: EpisodeLimits, engine: Any = None) -> Trajectory:
    async def scenario() -> Trajectory:
        # Many ends: messages are short, so that an episode has many.
        mine = engine or tiny_engine(eos_token_ids=range(12))
        try:
            return await Episodes([host(make)], Letters(), bounds).play(mine, request(budget), PROBLEM, 0)
        finally:
            await mine.close()

    played: Trajectory = run(scenario())
    return played


def masked_logps(prompt: Sequence[int], trajectory: Trajectory) -> Tensor:
    """Of each token in turn, by one forward pass over the whole sequence."""
    whole = full_logps(tiny_model(max_position_embeddings=256), prompt, trajectory.token_ids)
    return whole[torch.arange(len(trajectory.token_ids)), trajectory.token_ids]


def test_ten_turns_have_the_logps_of_one_forward_pass() -> None:
    engine = tiny_engine(tiny_model(max_position_embeddings=256), eos_token_ids=range(12))
    played = play(lambda: Scripted(10, first="9"), 200, limits(), engine)
    assert len(played.turn_ends) == 10
    assert played.first_observation == [17]
    mask = torch.tensor(played.mask)
    expected = masked_logps((5, 6, 7, 17), played)
    assert torch.allclose(torch.tensor(played.logps).double()[mask], expected[mask], atol=1e-4, rtol=0)
    assert len(played.logps) == len(played.versions) == len(played.mask) == len(played.token_ids)
    assert torch.tensor(played.logps)[~mask].eq(0).all()


def test_the_mask_is_true_for_messages_and_false_for_observations() -> None:
    played = play(lambda: Scripted(4), 60, limits())
    # Message up to its end token, then two tokens of the observation, three times; the last message ends it.
    position = 0
    for turn, end in enumerate(played.turn_ends):
        assert all(played.mask[position:end])
        assert played.token_ids[end - 1] < 12, "a message ends with an end token, which belongs to it"
        if turn < 3:
            observation = played.token_ids[end : end + 2]
            assert observation == [8 + turn + 1] * 2
            assert played.mask[end : end + 2] == [False, False]
        position = end + 2
    assert played.turn_ends[-1] == len(played.token_ids)
    assert played.turn_rewards == [0.1, 0.2, 0.3, 0.4]
    assert played.finish_reason == "stop"


def test_the_environment_reads_messages_and_never_its_own_words() -> None:
    made: list[Scripted] = []

    def make() -> Scripted:
        made.append(Scripted(3))
        return made[-1]

    played = play(make, 60, limits())
    starts = [0, *(end + 2 for end in played.turn_ends[:-1])]
    parts = [played.token_ids[a:b] for a, b in zip(starts, played.turn_ends, strict=True)]
    assert made[0].messages == [Letters().decode(part) for part in parts]


def test_the_turn_limit_ends_an_episode_as_cut() -> None:
    played = play(lambda: Scripted(10), 60, limits(turns=2))
    assert (len(played.turn_ends), played.finish_reason) == (2, "length")
    assert played.mask[-1] is True


def test_the_token_budget_counts_the_environments_tokens() -> None:
    for budget in range(2, 14):
        played = play(lambda: Scripted(10), budget, limits())
        assert len(played.token_ids) <= budget
        assert played.finish_reason == "length"
        assert played.mask[-1] is True
        assert len(played.turn_rewards) == len(played.turn_ends)


def test_a_message_that_is_cut_is_none() -> None:
    made: list[Scripted] = []

    def make() -> Scripted:
        made.append(Scripted(3))
        return made[-1]

    played = play(make, 60, limits(turn_tokens=4), tiny_engine(eos_token_ids=()))
    assert (len(played.token_ids), played.turn_rewards, played.finish_reason) == (4, [0.0], "length")
    assert made[0].messages == []


def test_an_update_between_two_turns_shows_in_the_versions() -> None:
    async def scenario() -> Trajectory:
        gate = StepGate(1)
        engine = tiny_engine(eos_token_ids=range(23), on_step=gate)
        episodes = Episodes([host(lambda: Scripted(3))], Letters(), limits())
        playing = asyncio.create_task(episodes.play(engine, request(30), PROBLEM, 0))
        await gate.reached()
        loading = asyncio.create_task(engine.load(7, policy_tensors(tiny_model(seed=1))))
        await asyncio.sleep(0)
        gate.open()
        await loading
        try:
            return await playing
        finally:
            await engine.close()

    played = run(scenario())
    assert played.versions[0] == 0
    assert played.versions[-1] == 7
    assert played.versions == sorted(played.versions)
    first_end = played.turn_ends[0]
    assert played.versions[first_end : first_end + 2] == [played.versions[first_end - 1]] * 2


# Environments that fail ------------------------------------------------------------------------------------------


class Hangs(Scripted):
    gate = threading.Event()

    def step(self, message: str) -> tuple[str, float, bool]:
        self.gate.wait(DEADLINE_S)
        return super().step(message)


def test_a_slow_environment_delays_only_its_own_episode_and_fails_at_its_limit() -> None:
    kinds = iter([Hangs, Scripted])

    async def scenario() -> None:
        engine = tiny_engine(eos_token_ids=range(12))
        episodes = Episodes([host(lambda: next(kinds)(2))], Letters(), limits(timeout_s=0.3))
        slow = asyncio.create_task(episodes.play(engine, request(30), PROBLEM, 0))
        await asyncio.sleep(0.05)
        played = await episodes.play(engine, request(30), PROBLEM, 1)
        assert len(played.turn_rewards) == 2
        with pytest.raises(DeadlineError, match="environment-0"):
            await slow
        await engine.close()

    run(scenario())
    Hangs.gate.set()


def test_an_environment_that_raises_fails_the_ticket_and_gives_no_reward() -> None:
    class Raises(Scripted):
        def step(self, message: str) -> tuple[str, float, bool]:
            raise OSError("gone")

    with pytest.raises(StageError) as caught:
        play(lambda: Raises(2), 30, limits())
    assert str(caught.value) == f"environment Raises.step failed on prompt {PROBLEM.prompt_id}: OSError: gone"


def test_an_episode_that_another_process_began_is_refused() -> None:
    async def scenario() -> None:
        with pytest.raises(StageError) as caught:
            await EnvironmentHost(lambda: Scripted(2)).step("p0.0.0", "x")
        assert str(caught.value) == ("environment: the episode p0.0.0 must have begun here, it has not; begin it again")

    run(scenario())


def test_episodes_that_are_over_or_forgotten_leave_nothing() -> None:
    async def scenario() -> None:
        now = [0.0]
        environments = EnvironmentHost(lambda: Scripted(2), forget_s=10, clock=lambda: now[0])
        await environments.open("a", PROBLEM)
        await environments.close("a")
        assert await environments.episodes() == 0
        await environments.open("b", PROBLEM)
        now[0] = 11.0
        await environments.open("c", PROBLEM)
        assert await environments.episodes() == 1
        assert isinstance(await environments.step("c", "x"), Step)

    run(scenario())


def test_generation_returns_episodes_as_a_valid_batch() -> None:
    async def scenario() -> None:
        engine = tiny_engine(eos_token_ids=range(12))
        episodes = Episodes([host(lambda: Scripted(3, first="9"))], Letters(), limits())
        worker = Generation(
            "generation-0", {"policy": engine}, Letters(), SamplingParams(40), _no_store, episodes=episodes
        )
        receipt, batch = await worker.generate(make_ticket(0, group_size=2), PROBLEM)
        await engine.close()
        rows = batch.to_pylist()
        assert receipt.rollouts == 2
        assert [row["prompt_token_ids"] for row in rows] == [[5, 6, 7, 17]] * 2
        assert rows[0]["response_token_ids"] != rows[1]["response_token_ids"]
        for row in rows:
            assert row["turn_rewards"] == [0.1, 0.2, 0.3]
            assert row["loss_mask"].count(False) == 4
            assert len(row["turn_ends"]) == 3

    run(scenario())


async def _no_store(*_: Any) -> Any:
    raise AssertionError("no weights are pulled here")
