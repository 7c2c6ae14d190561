"""A generation actor that keeps what it samples: opponents are in no journal."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from deploy.remote.generation import GenerationActor
from distrl.config import Config
from distrl.messages import GenerationReceipt
from distrl.tasks.problem import Problem
from distrl.tickets import Ticket


class RecordingGenerationActor(GenerationActor):
    """Writes every batch as an Arrow file beside the runs."""

    def __init__(self, config: Config, name: str, *arguments: Any) -> None:
        super().__init__(config, name, *arguments)
        self._folder = config.run.dir / f"{config.run.name}-sampled" / name
        self._folder.mkdir(parents=True, exist_ok=True)

    @ray.method(num_returns=2)
    async def generate(
        self, ticket: Ticket, problem: Problem | None = None
    ) -> tuple[GenerationReceipt, pa.RecordBatch]:
        receipt, batch = await super().generate(ticket, problem)
        with pa.ipc.new_file(self._folder / f"{ticket.rollout_id(0)}.arrow", batch.schema) as writer:
            writer.write_batch(batch)
        return receipt, batch


def recorded(run: Path) -> list[dict[str, Any]]:
    """Rollouts of all generation actors of a run, by its directory."""
    files = sorted((run.parent / f"{run.name}-sampled").glob("*/*.arrow"))
    return [row for path in files for row in pa.ipc.open_file(path).read_all().to_pylist()]
