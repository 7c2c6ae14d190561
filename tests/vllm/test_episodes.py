"""Episodes on vLLM: every turn is a request of its own, and the whole is one sequence of the learner."""

import asyncio
from typing import TYPE_CHECKING

import pytest
import torch

from actors.episodes import Episodes, Trajectory
from distrl.sampling import SampleRequest, SamplingParams
from distrl.weights import policy_tensors
from tests.actors.scripted import PROBLEM, Letters, Scripted, host, limits
from tests.engines.tiny import full_logps

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs these tests")

if TYPE_CHECKING:
    from tests.vllm.shared import OnLoop, SharedVllm

PROMPT = (5, 6, 7)
MANY_ENDS = tuple(range(12))
"""So that messages are short and an episode has many."""


def play(engine: "OnLoop", turns: int, stream: int = 0) -> Trajectory:
    async def scenario() -> Trajectory:
        request = SampleRequest(f"e{stream}.0", PROMPT, 1, SamplingParams(58), (0, 1, 0, stream))
        episodes = Episodes([host(lambda: Scripted(turns, first="9"))], Letters(), limits())
        return await episodes.play(engine, request, PROBLEM, 0)  # type: ignore[arg-type]

    return asyncio.run(asyncio.wait_for(scenario(), 120))


def one_forward(played: Trajectory, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Each token's log-probability by one pass of the learner's model over the whole episode."""
    from tests.vllm.shared import model

    learner = model()
    if weights is not None:
        learner.load_state_dict(weights, strict=False)
    whole = full_logps(learner, (*PROMPT, *played.first_observation), played.token_ids)
    return whole[torch.arange(len(played.token_ids)), played.token_ids]


def ten_turns(engine: "OnLoop") -> Trajectory:
    """How long a message is depends on what is sampled; of a few noises one leaves room for ten in the context."""
    for stream in range(20):
        played = play(engine, 10, stream)
        if len(played.turn_ends) == 10 and played.finish_reason == "stop":
            return played
    raise AssertionError("no episode of ten turns fits the context")


def test_ten_turns_have_the_logps_of_one_forward_pass(shared: "SharedVllm") -> None:
    played = ten_turns(shared.engine(eos_token_ids=MANY_ENDS))
    mask = torch.tensor(played.mask)
    logps = torch.tensor(played.logps, dtype=torch.float64)
    # Nine observations of two tokens, none after the last message.
    assert (~mask).sum() == 18
    assert torch.allclose(logps[mask], one_forward(played)[mask], atol=1e-4, rtol=0)
    assert logps[~mask].eq(0).all()
    assert len(played.logps) == len(played.versions) == len(played.mask) == len(played.token_ids)


def test_an_episode_over_an_update_names_the_version_of_every_turn(shared: "SharedVllm") -> None:
    """The turns before it have the old weights' log-probabilities, those after it the new ones': each turn's request
    reads the whole sequence again."""
    from tests.vllm.shared import model

    engine = shared.engine(eos_token_ids=MANY_ENDS)
    old = policy_tensors(model())
    generator = torch.Generator().manual_seed(3)
    new = {n: t + 0.05 * t.std() * torch.randn(t.shape, generator=generator) for n, t in old.items()}

    class UpdatedAfterTwo(Scripted):
        async def step(self, message: str) -> tuple[str, float, bool]:  # type: ignore[override]
            if len(self.messages) == 1:
                await engine.load(1, new)
            return super().step(message)

    async def scenario() -> Trajectory:
        request = SampleRequest("u0.0", PROMPT, 1, SamplingParams(58), (0, 1, 0, 0))
        episodes = Episodes([host(lambda: UpdatedAfterTwo(4, first="9"))], Letters(), limits())
        return await episodes.play(engine, request, PROBLEM, 0)  # type: ignore[arg-type]

    played = asyncio.run(asyncio.wait_for(scenario(), 120))
    versions, mask = torch.tensor(played.versions), torch.tensor(played.mask)
    # The observation after the second message still belongs to that message.
    boundary = played.turn_ends[1] + 2
    assert versions.tolist() == [0] * boundary + [1] * (len(played.token_ids) - boundary)
    logps = torch.tensor(played.logps, dtype=torch.float64)
    for version, weights in ((0, old), (1, new)):
        chosen = mask & (versions == version)
        assert chosen.any()
        assert torch.allclose(logps[chosen], one_forward(played, weights)[chosen], atol=1e-4, rtol=0)
    assert not torch.allclose(one_forward(played, old), one_forward(played, new), atol=1e-3, rtol=0)
