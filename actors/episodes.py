"""Plays episodes: the model's messages are sampled, the environment's observations put between them as tokens.

Token ids are carried from turn to turn and never made again from text: what is trained is what was sampled. The
sequence after the prompt is

    message 1, observation 1, message 2, observation 2, ..., message n

with a loss mask that is true for messages only. An observation has the log-probability 0 and the policy version of the
message before it: nothing was sampled.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.calls import Caller, WorkerLostError
from distrl.environments.protocol import Step
from distrl.errors import DistrlError, StageError
from distrl.sampling import Engine, FinishReason, Sample, SampleRequest, SamplingParams
from distrl.tasks.problem import Problem


@dataclass(slots=True)
class Trajectory:
    """One rollout. The first four lists have one entry per token after the prompt."""

    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    first_observation: list[int] = field(default_factory=list)
    """Tokens between the prompt and the first message; part of the prompt."""
    turn_rewards: list[float] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)
    """Tokens up to the end of each message."""


def single_turn(sample: Sample) -> Trajectory:
    """A response without an environment."""
    mask = [True] * len(sample.token_ids)
    return Trajectory(sample.token_ids, sample.logps, sample.versions, mask, sample.finish_reason)


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """When an episode ends; see `distrl.environments.config`."""

    max_turns: int
    max_turn_tokens: int | None
    timeout_s: float


class ObservationText(Protocol):
    """The part of a tokenizer that episodes need."""

    def observe(self, observation: str, chat: bool, /) -> tuple[int, ...]:
        """Tokens of an observation, up to where the model speaks; in a conversation by the chat template."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class Episodes:
    """Plays episodes against environment actors.

    Args:
        environments: callers of `actors.environments.EnvironmentHost`; each episode goes to the one with the fewest.
    """

    def __init__(self, environments: Sequence[Caller], text: ObservationText, limits: EpisodeLimits) -> None:
        self._environments = environments
        self._text = text
        self._limits = limits
        self._playing = [0] * len(environments)
        self._closing: set[asyncio.Task[None]] = set()

    async def play_group(self, engine: Engine, request: SampleRequest, problem: Problem) -> list[Trajectory]:
        """`request.responses` episodes at the same time; when one fails the others end with it. Raises like `play`."""
        plays = (self.play(engine, request, problem, index) for index in range(request.responses))
        tasks = [asyncio.ensure_future(play) for play in plays]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def play(self, engine: Engine, request: SampleRequest, problem: Problem, group_index: int) -> Trajectory:
        """One episode.

        Args:
            request: of the whole ticket; its `max_new_tokens` is the budget of the episode.
        Raises:
            StageError: the environment or the engine failed, was late or died; nothing is left of the episode.
        """
        place = min(range(len(self._environments)), key=self._playing.__getitem__)
        self._playing[place] += 1
        session = f"{request.request_id}.{group_index}"
        host = self._environments[place]
        try:
            observation: str = await self._ask(host, "open", session, problem)
            return await self._turns(engine, request, problem, group_index, host, session, observation)
        finally:
            self._playing[place] -= 1
            self._forget(host, session)

    async def _ask(self, host: Caller, method: str, *arguments: object) -> Any:
        try:
            return await host.ask(method, *arguments, timeout_s=self._limits.timeout_s)
        except WorkerLostError as error:
            # Else the coordinator would take the process that asked for the one that is gone.
            raise StageError(str(error)) from error

    def _forget(self, host: Caller, session: str) -> None:
        """Tells the environment that nobody goes on with the episode, and waits for nothing: it forgets by itself."""

        async def close() -> None:
            with contextlib.suppress(DistrlError):
                await host.ask("close", session, timeout_s=self._limits.timeout_s)

        task = asyncio.get_running_loop().create_task(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _turns(
        self,
        engine: Engine,
        request: SampleRequest,
        problem: Problem,
        group_index: int,
        host: Caller,
        session: str,
        observation: str,
    ) -> Trajectory:
        chat = bool(problem.messages)
        trajectory = Trajectory()
        if observation:
            trajectory.first_observation = list(self._text.observe(observation, chat))
        prompt = (*request.prompt_token_ids, *trajectory.first_observation)
        budget = request.params.max_new_tokens
        for turn in range(self._limits.max_turns):
            left = budget - len(trajectory.token_ids)
            params = _with_length(request.params, min(left, self._limits.max_turn_tokens or left))
            # Plus one: a stream that ends in 0 could be that of a shorter name.
            stream = (*request.stream, group_index + 1, turn + 1)
            (sample,) = await engine.sample(
                SampleRequest(f"{session}.{turn}", (*prompt, *trajectory.token_ids), 1, params, stream)
            )
            trajectory.token_ids += sample.token_ids
            trajectory.logps += sample.logps
            trajectory.versions += _never_older(trajectory.versions, sample.versions)
            trajectory.mask += [True] * len(sample.token_ids)
            trajectory.turn_ends.append(len(trajectory.token_ids))
            if sample.finish_reason == "length":
                # A message without its end is none: the environment does not get it.
                trajectory.turn_rewards.append(0.0)
                trajectory.finish_reason = "length"
                return trajectory
            message = self._text.decode(sample.token_ids)
            step: Step = await self._ask(host, "step", session, message)
            trajectory.turn_rewards.append(step.reward)
            if step.done:
                return trajectory
            tokens = self._text.observe(step.observation, chat)
            last = turn + 1 == self._limits.max_turns
            if last or len(trajectory.token_ids) + len(tokens) >= budget:
                trajectory.finish_reason = "length"
                return trajectory
            trajectory.token_ids += tokens
            trajectory.logps += [0.0] * len(tokens)
            trajectory.versions += trajectory.versions[-1:] * len(tokens)
            trajectory.mask += [False] * len(tokens)
        raise AssertionError("max_turns is at least 1")


def _with_length(params: SamplingParams, max_new_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens, params.temperature, params.top_p, params.top_k)


def _never_older(before: Sequence[int], versions: list[int]) -> list[int]:
    assert not before or versions[0] >= before[-1], "an engine never goes back to older weights"
    return versions
