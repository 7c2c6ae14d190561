"""Stage 1 of A*-PO: responses of the reference model to every training prompt, sampled and graded by a run's stages."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from actors.flight import Flight
from actors.pipeline import Pipeline, TicketFailedError
from actors.pool import anybody
from distrl.schema import Role
from distrl.seeding import Purpose
from distrl.tasks.problem import Problem
from distrl.tickets import Ticket
from distrl.values_table import PromptRewards


@dataclass(frozen=True, slots=True)
class Prompt:
    """One training prompt and the hash of its tokens."""

    problem: Problem
    sha256: str


class ValueSampler:
    """Samples and grades `responses` responses to each prompt; the noise of a prompt depends on seed and tokens only.

    Args:
        read: gets a batch by its reference.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        seed: int,
        responses: int,
        read: Callable[[Any], Awaitable[pa.RecordBatch]],
        clock: Callable[[], float],
    ) -> None:
        self._pipeline = pipeline
        self._seed = seed
        self._responses = responses
        self._read = read
        self._clock = clock

    async def run(self, prompts: Sequence[Prompt], done: Callable[[PromptRewards | TicketFailedError], None]) -> None:
        """Samples all prompts, in any order.

        Args:
            done: told of each prompt, as it is done or given up.
        """
        waiting = iter(enumerate(prompts))

        async def worker() -> None:
            for number, prompt in waiting:
                try:
                    found: PromptRewards | TicketFailedError = await self._one(number, prompt)
                except TicketFailedError as error:
                    found = error
                done(found)

        places = sum(member.capacity for member in self._pipeline.pool_of(Role.REFERENCE).members) // self._responses
        # One more than fit, so that a place that becomes free is taken at once.
        async with asyncio.TaskGroup() as group:
            for _ in range(min(places + 1, len(prompts))):
                group.create_task(worker())

    async def _one(self, number: int, prompt: Prompt) -> PromptRewards:
        ticket = Ticket(
            ticket_id=number,
            redraw=0,
            prompt_id=prompt.problem.prompt_id,
            prompt=prompt.problem.prompt,
            role=Role.REFERENCE,
            group_size=self._responses,
            stream=noise_stream(self._seed, prompt.sha256),
            messages=prompt.problem.messages,
        )
        flight = Flight(ticket, prompt.problem, oldest_step=0, issued_s=self._clock())
        receipt = await self._pipeline.sample(flight, None, anybody)
        await self._pipeline.grade(flight)
        graded = await self._read(flight.grading)
        ids = graded.column("rollout_id").to_pylist()
        rows = [ids.index(ticket.rollout_id(i)) for i in range(self._responses)]
        rewards, verdicts = graded.column("reward").to_pylist(), graded.column("verdict").to_pylist()
        return PromptRewards(
            prompt.sha256,
            prompt.problem.prompt_id,
            tuple(rewards[row] for row in rows),
            sum(verdicts[row] == "correct" for row in rows),
            receipt.response_tokens,
        )


def noise_stream(seed: int, sha256: str) -> tuple[int, ...]:
    """Names the sampling noise of a prompt: the same whatever its place in the training set."""
    return (seed, int(Purpose.REFERENCE_SAMPLING), int(sha256[:15], 16))
