"""Replay: gives tickets the rollouts and grades that another run has recorded, in place of sampling and grading."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from distrl.errors import RunError, SchemaError
from distrl.journal_file import read_verified, ticket_rows
from distrl.messages import GenerationReceipt, GradingReceipt
from distrl.schema import SCHEMAS, Role, Stage, record_batch
from distrl.storage import Folder
from distrl.tickets import Recorded, Ticket

FILES = 4
"""Journal files that are kept open; tickets come in the order in which they were recorded, almost file by file."""


class Replay:
    """Reads the journal of a run that has ended.

    The rollouts get the numbers of the ticket that replays them, their role becomes `replay`; tokens, behavior
    log-probabilities, policy versions and grades stay as they were recorded.

    Args:
        folder: with the journal files.
        vocabulary: tokens that the model knows; a recorded one beyond is refused.
        clock: seconds since the epoch.
    """

    def __init__(self, folder: Folder, vocabulary: int, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._vocabulary = vocabulary
        self._clock = clock
        self._files: OrderedDict[str, pa.Table] = OrderedDict()
        self._lock = Lock()  # of `_files`: tickets are read in threads

    @ray.method(num_returns=2)
    async def generate(self, ticket: Ticket) -> tuple[GenerationReceipt, pa.RecordBatch]:
        """The columns of generation.

        Raises:
            RunError: the recording is damaged, not there, or of another vocabulary: no fault of the ticket.
        """
        started_s = self._clock()
        batch = await asyncio.to_thread(self._columns, Stage.GENERATION, ticket)
        tokens = int(pc.sum(pc.list_value_length(batch.column("response_token_ids"))).as_py())
        truncated = int(pc.sum(pc.equal(batch.column("finish_reason"), "length")).as_py())
        rows, size = batch.num_rows, batch.nbytes
        receipt = GenerationReceipt(ticket.ticket_id, rows, tokens, truncated, (), size, started_s, self._clock())
        return receipt, batch

    @ray.method(num_returns=2)
    async def grades(self, ticket: Ticket) -> tuple[GradingReceipt, pa.RecordBatch]:
        """The columns of grading, as recorded; errors as for `generate`."""
        started_s = self._clock()
        batch = await asyncio.to_thread(self._columns, Stage.GRADING, ticket)
        reward = float(pc.sum(batch.column("reward")).as_py())
        correct = int(pc.sum(pc.equal(batch.column("verdict"), "correct")).as_py())
        rows, size = (batch.num_rows,), batch.nbytes
        receipt = GradingReceipt((reward,), (correct,), rows, ({},), (None,), size, started_s, self._clock())
        return receipt, batch

    def _columns(self, stage: Stage, ticket: Ticket) -> pa.RecordBatch:
        """A stage's columns of what a ticket replays, validated."""
        recorded = ticket.recorded
        if recorded is None:
            raise RunError(f"ticket {ticket.ticket_id} must name what it replays; this is a fault of distrl")
        rows = self._rows(recorded)
        columns: dict[str, Any] = {name: rows.column(name) for name in SCHEMAS[stage].names}
        columns["rollout_id"] = [ticket.rollout_id(g) for g in range(rows.num_rows)]
        if stage is Stage.GENERATION:
            self._check_vocabulary(recorded, rows)
            columns["ticket_id"] = np.full(rows.num_rows, ticket.ticket_id)
            columns["redraw"] = np.full(rows.num_rows, ticket.redraw, dtype=np.int32)
            columns["role"] = [Role.REPLAY.value] * rows.num_rows
            columns["v_star"] = [ticket.v_star] * rows.num_rows
        try:
            return record_batch(stage, columns)
        except SchemaError as error:
            raise RunError(self._damaged(recorded, str(error))) from error

    def _rows(self, recorded: Recorded) -> pa.RecordBatch:
        """The rows of a recorded ticket, in the order of the group."""
        try:
            rows = ticket_rows(self._table(recorded), recorded.ticket_id, recorded.redraw)
            rows = rows.sort_by("group_index")
        except SchemaError as error:
            raise RunError(self._damaged(recorded, str(error))) from error
        if rows.num_rows != recorded.rollouts:
            raise RunError(
                self._damaged(recorded, f"it must have {recorded.rollouts} rollouts of it, got {rows.num_rows}")
            )
        return rows

    def _table(self, recorded: Recorded) -> pa.Table:
        """The journal file of a ticket, which has the hash that the recorded run's ledger names."""
        with self._lock:
            if recorded.file not in self._files:
                self._files[recorded.file] = read_verified(self._folder, recorded.file, recorded.sha256)
            self._files.move_to_end(recorded.file)
            while len(self._files) > FILES:
                self._files.popitem(last=False)
            return self._files[recorded.file]

    def _check_vocabulary(self, recorded: Recorded, rows: pa.RecordBatch) -> None:
        for name in ("prompt_token_ids", "response_token_ids"):
            largest = pc.max(rows.column(name).flatten()).as_py()
            if largest is not None and largest >= self._vocabulary:
                raise RunError(
                    f"replay.journal: {name} of recorded ticket {recorded.ticket_id} must be tokens of model.path, "
                    f"which knows {self._vocabulary}, got {largest}; train a model with the recording's tokenizer"
                )

    def _damaged(self, recorded: Recorded, rule: str) -> str:
        return (
            f"replay.journal: {self._folder / recorded.file} must hold the rollouts of recorded ticket "
            f"{recorded.ticket_id}: {rule}; put the file back as it was, then go on with distrl resume"
        )
