"""The decode loop: requests join and leave between steps, and so do new weights. No thread, no lock, no asyncio here.

**A request's tokens and log-probabilities are the same bits whatever runs beside it**, whichever slots it gets and
whenever it comes, as long as the weights are the same. This rests on four things:

- a row's tokens sit at positions 0, 1, ... of its slot, and its noise is its own;
- every matrix product has a multiple of 32 rows (`rows.ROW_BUCKET`), every attention a multiple of 16 positions
  (`cache.POSITION_BUCKET`); beyond these the CPU kernels of torch give a row the same bits at any size;
- one torch thread. With more, MKL splits long sums (layers wider than 512) by the number of rows;
- the sampler works on float64 row by row.

The first two hold for float32 on x86 with MKL, and tests/engines/test_determinism.py checks them where it is run.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from actors.engines.cache import POSITION_BUCKET, LayerStates, SlotCache, round_up
from actors.engines.rows import ROW_BUCKET, Job, Prefill, Rows, Seat
from distrl.sampling import LoadReport, UpdateMode
from distrl.weights import check_newer, check_policy, copy_policy, policy_tensors

T = TypeVar("T")

PREFILL_PROMPTS = 16
"""Most prompts in one prefill. Each gets logits at the ends of all of them, so this bounds these to 256 rows."""

PREFILL_TOKENS = 4096
"""Most tokens in one prefill, unless a single prompt is longer; bounds how long the rows in flight wait for it."""

PREFILL_INTERVAL = 4
"""Most steps for which free slots stay free so that one prefill can fill several.

A prefill of few prompts costs nearly as much as one of many: with 64 slots and responses of 9 tokens, filling every
slot at once takes a sixth off the tokens per second.
"""


class Decoder:
    """Continuous batching over the slots of one model."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        context_length: int,
        eos_V: Tensor,
        pad_token_id: int,
        slots: int,
        version: int,
        update_mode: UpdateMode = "keep",
    ) -> None:
        """
        Args:
            eos_V: bool, True for the tokens that end a response.
            pad_token_id: any token; fills the prompts up and is never attended to.
        """
        self._model = model.eval().requires_grad_(False)
        self._policy = policy_tensors(model)
        self._dtype = next(model.parameters()).dtype
        whole_config: Any = model.config
        config = whole_config.get_text_config()
        self._layer_types: frozenset[str] = frozenset(getattr(config, "layer_types", None) or ())
        self._window: int | None = getattr(config, "sliding_window", None)
        self._device = eos_V.device
        self._context_length = context_length
        self._pad_token_id = pad_token_id
        self._cache = SlotCache(round_up(slots, ROW_BUCKET), context_length)
        self._rows = Rows(slots, eos_V)
        self._waiting: deque[Job] = deque()
        self._steps_without_prefill = 0
        self._update_mode = update_mode
        self.version = version

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or self._rows.live > 0

    def submit(self, job: Job) -> None:
        self._waiting.append(job)

    def cancel(self, job: Job) -> None:
        """Forget a job and free its rows; no error if it is complete or unknown."""
        if job in self._waiting:
            self._waiting.remove(job)
        rows = self._rows.owned_by(job)
        if rows:
            self._rows.release(rows)

    def check(self, version: int, tensors: Mapping[str, Tensor], *, changed_only: bool) -> None:
        """Raise PolicyError where `load` would for the tensors' sake; reads no weights, so any thread may call it."""
        check_policy(version, self._policy, tensors, changed_only=changed_only)

    def load(self, version: int, tensors: Mapping[str, Tensor]) -> LoadReport:
        """Replace weights; what `tensors` lacks stays.

        The next tokens see keys and values of older versions, unless these are computed again.

        Raises:
            PolicyError: `version` is older than the one that is loaded; the old weights stay.
        """
        check_newer(version, self.version)
        started = perf_counter()
        copy_policy(self._policy, tensors)
        for job in self._waiting:
            # Its logits would give first tokens of the old weights under the new version.
            job.prefill = None
        self.version = version
        if self._update_mode == "recompute":
            self._recompute_cache()
        return LoadReport(version, perf_counter() - started, self._rows.live)

    def step(self) -> list[Job]:
        """Admit what fits, then sample one token for every live row; returns the jobs that are complete by it."""
        complete = self._admit()
        moved = self._rows.compact()
        if moved is not None:
            self._cache.move(*moved)
        R = self._rows.extent
        if R:
            complete += self._decode(R)
        return complete

    def _decode(self, R: int) -> list[Job]:
        positions = self._rows.length_S[:R].clone()
        length = round_up(int(positions.max()) + 1, POSITION_BUCKET)
        self._cache.aim(positions, length)
        seen = torch.arange(length, device=self._device) <= positions[:, None]
        logits = self._forward(
            input_ids=self._rows.last_token_S[:R, None],
            attention_mask=self._masks(seen, positions),
            position_ids=positions[:, None],
            past_key_values=self._cache,
        )[:, -1]
        self._rows.length_S[:R] += self._rows.live_S[:R]
        return self._sample(torch.arange(R, device=self._device), logits)

    def _masks(self, seen: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """What each row's token attends to: one mask, or one per kind of layer where they differ."""

        def additive(seen: Tensor) -> Tensor:
            mask = torch.zeros(seen.shape, dtype=self._dtype, device=self._device).masked_fill_(~seen, -torch.inf)
            return mask[:, None, None]

        sliding = "sliding_attention" in self._layer_types or not self._layer_types
        if self._window is None or not sliding:
            return additive(seen)
        # A window of w positions ends with the token's own.
        near = seen & (torch.arange(seen.shape[1], device=self._device) > positions[:, None] - self._window)
        if not self._layer_types:
            return additive(near)
        return {"full_attention": additive(seen), "sliding_attention": additive(near)}

    def _sample(self, rows: Tensor, logits: Tensor) -> list[Job]:
        ended = self._rows.sample(rows, logits, self.version)
        return self._rows.finish(ended) if ended else []

    def _admit(self) -> list[Job]:
        """Give free slots to waiting responses, first come first served, and sample their first tokens."""
        free = self._rows.free() if self._waiting else []
        self._steps_without_prefill += 1
        if 4 * len(free) < self._rows.live and self._steps_without_prefill < PREFILL_INTERVAL:
            return []
        seats: list[Seat] = []
        while self._waiting and free:
            job = self._waiting[0]
            slots = free[: job.request.responses - job.admitted]
            del free[: len(slots)]
            seats.append(Seat(job, job.admitted, slots))
            job.admitted += len(slots)
            if job.admitted == job.request.responses:
                self._waiting.popleft()
        return self._start(seats) if seats else []

    def _start(self, seats: Sequence[Seat]) -> list[Job]:
        self._steps_without_prefill = 0
        unknown = [seat.job for seat in seats if seat.job.prefill is None]
        for jobs in _batches(unknown, key=lambda job: len(job.request.prompt_token_ids)):
            self._prefill(jobs)
        by_prefill: dict[Prefill, list[Seat]] = {}
        for seat in seats:
            assert seat.job.prefill is not None
            by_prefill.setdefault(seat.job.prefill, []).append(seat)
        logits, seated = [], []
        for prefill, group in by_prefill.items():
            slots = self._index([slot for seat in group for slot in seat.slots])
            prompts = self._index([seat.job.prompt for seat in group for _ in seat.slots])
            self._cache.fill(slots, prompts, prefill.states)
            logits.append(prefill.logits[prompts])
            seated += group
        for seat in seated:
            if seat.job.admitted == seat.job.request.responses:
                seat.job.prefill = None
        return self._sample(self._rows.seat(seated), torch.cat(logits))

    def _recompute_cache(self) -> None:
        """Compute the keys and values of all live rows anew, from their prompts and what was sampled so far."""
        for rows in _batches(self._rows.histories(), key=lambda row: len(row[1])):
            prefill, _ = self._forward_prompts([history for _, history in rows])
            self._cache.fill(self._index([slot for slot, _ in rows]), self._index(list(range(len(rows)))), prefill)

    def _prefill(self, jobs: Sequence[Job]) -> None:
        states, logits = self._forward_prompts([job.request.prompt_token_ids for job in jobs])
        prefill = Prefill(states, logits)
        for row, job in enumerate(jobs):
            job.prefill, job.prompt = prefill, row

    def _forward_prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[list[LayerStates], Tensor]:
        """Compute prompts together, padded on the right; their keys and values, and the logits [P, V] after each."""
        width = round_up(max(len(prompt) for prompt in prompts), POSITION_BUCKET)
        # Powers of two from 2 up: with the width and the number of ends below, every product has a multiple of 32 rows.
        P = max(2, 1 << (len(prompts) - 1).bit_length())
        ids = torch.full((P, width), self._pad_token_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ends = sorted({len(prompt) - 1 for prompt in prompts})
        padded_ends = ends + ends[-1:] * (round_up(len(ends), max(1, ROW_BUCKET // P)) - len(ends))
        # Padding may run over the end of a model with learned positions.
        positions = torch.arange(width, device=self._device).clamp(max=self._context_length - 1)
        cache = DynamicCache()
        logits = self._forward(
            input_ids=ids.to(self._device),
            position_ids=positions.expand(P, width),
            past_key_values=cache,
            logits_to_keep=self._index(padded_ends),
        )
        rows, columns = range(len(prompts)), [ends.index(len(prompt) - 1) for prompt in prompts]
        layers: list[Any] = cache.layers
        return [(layer.keys, layer.values) for layer in layers], logits[list(rows), columns]

    def _forward(self, **inputs: Any) -> Tensor:
        logits: Tensor = self._model(**inputs, use_cache=True).logits
        return logits

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _batches(prompts: Sequence[T], key: Callable[[T], int]) -> list[list[T]]:
    """What is computed together: prompts of similar length, within PREFILL_PROMPTS and PREFILL_TOKENS.

    Args:
        key: length of a prompt in tokens.
    """
    batches: list[list[T]] = []
    for prompt in sorted(prompts, key=key):
        if batches and len(batches[-1]) < min(
            PREFILL_PROMPTS, PREFILL_TOKENS // round_up(key(prompt), POSITION_BUCKET)
        ):
            batches[-1].append(prompt)
        else:
            batches.append([prompt])
    return batches
