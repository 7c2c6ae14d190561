"""Reference scoring: log-probabilities of responses under the frozen reference model."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from distrl.messages import ReferenceReceipt
from distrl.schema import Stage, record_batch

Score = Callable[[pa.RecordBatch], Sequence[np.ndarray]]
"""Generation batch to one array of log-probabilities per rollout, one entry per response token."""


class Reference:
    """Scores tickets one by one, so that a rollout's numbers do not depend on what else is in the call.

    Args:
        version: of the reference weights, for the `ref_version` column.
        clock: seconds since the epoch.
    """

    def __init__(self, score: Score, version: int = 0, clock: Callable[[], float] = time.time) -> None:
        self._score = score
        self._version = version
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reference")

    @ray.method(num_returns=2)
    async def score(self, *batches: pa.RecordBatch) -> tuple[ReferenceReceipt, pa.RecordBatch]:
        """Log-probabilities of the rollouts of several tickets, one generation batch each.

        Raises:
            SchemaError: the model gave something that is no log-probability.
        """
        loop = asyncio.get_running_loop()
        started_s = self._clock()
        scored = [row for batch in batches for row in await loop.run_in_executor(self._thread, self._score, batch)]
        finished_s = self._clock()
        rows = len(scored)
        columns: dict[str, Any] = {
            "rollout_id": [i for batch in batches for i in batch.column("rollout_id").to_pylist()],
            "ref_logps": scored,
            "ref_version": [self._version] * rows,
            "reference_started_s": [started_s] * rows,
            "reference_finished_s": [finished_s] * rows,
        }
        batch = record_batch(Stage.REFERENCE, columns)
        tokens = sum(len(row) for row in scored)
        return ReferenceReceipt(tokens, batch.nbytes, started_s, finished_s), batch
