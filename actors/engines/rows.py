"""What the decode loop knows of each row: tensors over slots, so that a step costs the same Python at any row count.

Shape suffixes: S slots, R rows of a forward pass, N tokens a response may have, P prompts of a prefill, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.engines.cache import LayerStates, round_up
from actors.engines.sampler import sample_tokens
from distrl.sampling import FinishReason, Sample, SampleRequest

ROW_BUCKET = 32
"""Rows of a forward pass are padded to a multiple of this.

CPU matrix products give a row the same bits at any row count >= 16 but other bits below, and elementwise kernels take
32 floats at a time and the last few one by one.
"""


@dataclass(eq=False, slots=True)
class Prefill:
    """What one forward pass over prompts left."""

    states: list[LayerStates]
    logits: Tensor
    """[P, V], of the token after each prompt."""


@dataclass(eq=False, slots=True)
class Job:
    """A request on its way through the slots."""

    request: SampleRequest
    noise: NDArray[np.float64]
    """[responses, max_new_tokens] in [0, 1), see `distrl.seeding.sampling_noise`."""
    samples: dict[int, Sample] = field(default_factory=dict)
    """Finished responses by index."""
    admitted: int = 0
    """Responses that were given a slot, finished or not."""
    prefill: Prefill | None = None
    """Kept while responses wait for slots, so that they need no prefill of their own."""
    prompt: int = 0
    """The prompt's row in `prefill`."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Slots that some responses of one job take: response `first + i` takes `slots[i]`."""

    job: Job
    first: int
    slots: list[int]


class Rows:
    """State of every slot, live or free. A free row is computed along with the live ones and changes nothing."""

    def __init__(self, slots: int, eos_V: Tensor) -> None:
        S, device = round_up(slots, ROW_BUCKET), eos_V.device
        self._eos_V = eos_V
        self._owners: list[tuple[Job, int] | None] = [None] * slots
        self.live_S = torch.zeros(S, dtype=torch.bool, device=device)
        self.length_S = torch.zeros(S, dtype=torch.int64, device=device)
        """Tokens in the cache, which is also the position of the next one."""
        self.last_token_S = torch.zeros(S, dtype=torch.int64, device=device)
        """Sampled, not in the cache yet."""
        self._step_S = torch.zeros(S, dtype=torch.int64, device=device)
        self._limit_S = torch.zeros(S, dtype=torch.int64, device=device)
        self._temperature_S = torch.ones(S, dtype=torch.float64, device=device)
        self._top_k_S = torch.zeros(S, dtype=torch.int64, device=device)
        self._top_p_S = torch.ones(S, dtype=torch.float64, device=device)
        self._noise_SN = torch.zeros((S, 1), dtype=torch.float64, device=device)
        self._tokens_SN = torch.zeros((S, 1), dtype=torch.int64, device=device)
        self._logps_SN = torch.zeros((S, 1), dtype=torch.float64, device=device)
        self._versions_SN = torch.zeros((S, 1), dtype=torch.int64, device=device)

    @property
    def live(self) -> int:
        return sum(owner is not None for owner in self._owners)

    @property
    def extent(self) -> int:
        """Rows that a forward pass must have to cover every live one."""
        last = max((slot for slot, owner in enumerate(self._owners) if owner), default=-1)
        return round_up(last + 1, ROW_BUCKET)

    def free(self) -> list[int]:
        return [slot for slot, owner in enumerate(self._owners) if owner is None]

    def owned_by(self, job: Job) -> list[int]:
        return [slot for slot, owner in enumerate(self._owners) if owner and owner[0] is job]

    def histories(self) -> list[tuple[int, list[int]]]:
        """Every live slot and the tokens whose keys and values it holds: the prompt and all but the last sampled."""
        live = [(slot, owner[0]) for slot, owner in enumerate(self._owners) if owner]
        steps, tokens = self._step_S.tolist(), self._tokens_SN.tolist()
        return [(slot, [*job.request.prompt_token_ids, *tokens[slot][: steps[slot] - 1]]) for slot, job in live]

    def seat(self, seats: Sequence[Seat]) -> Tensor:
        """Start responses in free slots, their prompts being in the cache; returns the slots, in the seats' order."""
        requests = [seat.job.request for seat in seats for _ in seat.slots]
        self._widen(max(request.params.max_new_tokens for request in requests))
        for seat in seats:
            noise = torch.from_numpy(seat.job.noise[seat.first : seat.first + len(seat.slots)])
            self._noise_SN[seat.slots, : noise.shape[1]] = noise.to(self._noise_SN.device)
            for i, slot in enumerate(seat.slots):
                self._owners[slot] = (seat.job, seat.first + i)
        slots = self._index([slot for seat in seats for slot in seat.slots])
        params = [request.params for request in requests]
        self.length_S[slots] = self._index([len(request.prompt_token_ids) for request in requests])
        self._limit_S[slots] = self._index([p.max_new_tokens for p in params])
        self._top_k_S[slots] = self._index([p.top_k for p in params])
        self._temperature_S[slots] = slots.new_tensor([p.temperature for p in params], dtype=torch.float64)
        self._top_p_S[slots] = slots.new_tensor([p.top_p for p in params], dtype=torch.float64)
        self.live_S[slots] = True
        return slots

    def sample(self, rows: Tensor, logits_RV: Tensor, version: int) -> list[int]:
        """Draw and record the next token of `rows`; returns those that ended with it."""
        step = self._step_S[rows]
        tokens, logps = sample_tokens(
            logits_RV,
            self._temperature_S[rows],
            self._top_k_S[rows],
            self._top_p_S[rows],
            self._noise_SN[rows, step],
        )
        # A free row writes too, always to index 0, which the next response there overwrites.
        self._tokens_SN[rows, step] = tokens
        self._logps_SN[rows, step] = logps
        self._versions_SN[rows, step] = version
        self.last_token_S[rows] = tokens
        live = self.live_S[rows]
        step = step + live
        self._step_S[rows] = step
        ended = live & (self._eos_V[tokens] | (step >= self._limit_S[rows]))
        return [int(row) for row in rows[ended]]

    def finish(self, rows: list[int]) -> list[Job]:
        """Hand the responses in `rows` to their jobs and free the rows; returns the jobs that are complete by it."""
        index = self._index(rows)
        counts = self._step_S[index].tolist()
        longest = max(counts)
        columns = (self._tokens_SN, self._logps_SN, self._versions_SN)
        tokens, logps, versions = (column[index, :longest].tolist() for column in columns)
        stopped = self._eos_V[self.last_token_S[index]].tolist()
        complete = []
        for i, (row, n) in enumerate(zip(rows, counts, strict=True)):
            owner = self._owners[row]
            assert owner is not None
            job, response = owner
            reason: FinishReason = "stop" if stopped[i] else "length"
            job.samples[response] = Sample(tokens[i][:n], logps[i][:n], versions[i][:n], reason)
            if len(job.samples) == job.request.responses:
                complete.append(job)
        self.release(rows)
        return complete

    def release(self, rows: list[int]) -> None:
        """Free rows whatever they were doing."""
        for row in rows:
            self._owners[row] = None
        index = self._index(rows)
        self.live_S[index] = False
        # At length 0 a free row does not lengthen the attention of all; untruncated it does not cost a sort.
        for tensor, idle in (
            (self.length_S, 0),
            (self._step_S, 0),
            (self._temperature_S, 1.0),
            (self._top_k_S, 0),
            (self._top_p_S, 1.0),
        ):
            tensor[index] = idle

    def compact(self) -> tuple[Tensor, Tensor] | None:
        """Move rows down where that makes `extent` smaller; returns (sources, targets) for the cache to follow."""
        wanted = round_up(self.live, ROW_BUCKET)
        if wanted >= self.extent:
            return None
        sources = [slot for slot, owner in enumerate(self._owners) if owner and slot >= wanted]
        targets = self.free()[: len(sources)]
        for source, target in zip(sources, targets, strict=True):
            self._owners[target], self._owners[source] = self._owners[source], None
        moved = self._index(sources), self._index(targets)
        for tensor in (
            self.live_S,
            self.length_S,
            self.last_token_S,
            self._step_S,
            self._limit_S,
            self._temperature_S,
            self._top_k_S,
            self._top_p_S,
            self._noise_SN,
            self._tokens_SN,
            self._logps_SN,
            self._versions_SN,
        ):
            tensor[moved[1]] = tensor[moved[0]]
        self.release(sources)
        return moved

    def _widen(self, tokens: int) -> None:
        missing = tokens - self._tokens_SN.shape[1]
        if missing > 0:
            pad = torch.nn.functional.pad
            self._noise_SN = pad(self._noise_SN, (0, missing))
            self._tokens_SN = pad(self._tokens_SN, (0, missing))
            self._logps_SN = pad(self._logps_SN, (0, missing))
            self._versions_SN = pad(self._versions_SN, (0, missing))

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.live_S.device)
