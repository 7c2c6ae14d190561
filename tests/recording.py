"""Generation actors for tests: one keeps what it samples, as opponents are in no journal, and one can be held."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from deploy.remote.generation import GenerationActor
from distrl.config import Config
from distrl.messages import GenerationReceipt
from distrl.schema import Role
from distrl.tasks.problem import Problem
from distrl.tickets import Ticket

HELD_TICKET = 5
"""Whose opponents `HeldGenerationActor` holds."""


class RecordingGenerationActor(GenerationActor):
    """Writes every batch as an Arrow file beside the runs."""

    def __init__(self, config: Config, name: str, *arguments: Any) -> None:
        super().__init__(config, name, *arguments)
        self._folder = sampled(config.run_dir) / f"{name}-{os.getpid()}"
        self._folder.mkdir(parents=True, exist_ok=True)

    @ray.method(num_returns=2)
    async def generate(
        self, ticket: Ticket, problem: Problem | None = None
    ) -> tuple[GenerationReceipt, pa.RecordBatch]:
        receipt, batch = await super().generate(ticket, problem)
        with pa.ipc.new_file(self._folder / f"{ticket.rollout_id(0)}.arrow", batch.schema) as writer:
            writer.write_batch(batch)
        return receipt, batch


class HeldGenerationActor(RecordingGenerationActor):
    """Never returns the opponents of `HELD_TICKET` that it is asked for first by anybody, and says who it is."""

    @ray.method(num_returns=2)
    async def generate(
        self, ticket: Ticket, problem: Problem | None = None
    ) -> tuple[GenerationReceipt, pa.RecordBatch]:
        if (ticket.role, ticket.ticket_id) == (Role.OPPONENT, HELD_TICKET):
            aside = self._folder / "held"
            aside.write_text(str(os.getpid()))
            try:
                os.link(aside, self._folder.parent / "held")
            except FileExistsError:
                pass  # it was held elsewhere, and is drawn again here
            else:
                sampling = asyncio.ensure_future(super().generate(ticket, problem))
                await asyncio.Event().wait()
                await sampling
        return await super().generate(ticket, problem)


def sampled(run: Path) -> Path:
    """The folder of what the actors of a run have sampled, by its directory; in it one folder per process."""
    return run.parent / f"{run.name}-sampled"


def recorded(run: Path) -> list[dict[str, Any]]:
    """Rollouts of all generation actors of a run, by its directory."""
    files = sorted(sampled(run).glob("*/*.arrow"))
    return [row for path in files for row in pa.ipc.open_file(path).read_all().to_pylist()]
