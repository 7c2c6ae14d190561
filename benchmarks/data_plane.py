"""How fast do rollouts pass from generation to the learner, and how often is a byte copied?

    python -m benchmarks.data_plane [--repetitions 5] [--tickets 16] [--rollouts 64] [--tokens 1024]

One global batch of random rollouts goes the way of a run on one node: each ticket's columns are validated, put into
Ray's object store, got back, joined with grades and reference scores, and laid out for the learner. Every step is timed
over the whole batch, beside a copy of the same bytes from memory to memory; the repetitions alternate and the medians
count. Speeds are bytes of the batch over the seconds of the step, and the ratios those over the memory copy's.

Copies: Arrow's pool and NumPy (through tracemalloc) say what a step allocated, over the bytes of the batch. `put`
copies once, into shared memory, which neither of the two sees and which counts as 1. `shared` says how many of the got
buffers lie in the object store's memory. `slice` is the size of what putting a slice of four rows writes, over the
bytes of these four rows: it must be near 1, while the slice itself still holds the whole buffer.

Prints a JSON line per repetition and one with the ratios.
"""

import argparse
import json
import logging
import pickle
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from distrl.rollouts import join
from distrl.schema import Role, Stage, record_batch, validate
from learners.batches import training_batch

Rows = tuple[pa.RecordBatch, pa.RecordBatch, pa.RecordBatch]


def ticket(
    number: int,
    rollouts: int,
    tokens: int,
    rng: np.random.Generator,
    prompt_tokens: int = 64,
    vocabulary: int = 1000,
) -> Rows:
    """Generation, grading and reference columns of one ticket, as the stages make them, with random tokens."""

    def lists(values: np.ndarray) -> pa.Array:
        offsets = pa.array(np.arange(rollouts + 1, dtype=np.int32) * (len(values) // rollouts))
        flat = pa.array(values)
        return pa.ListArray.from_arrays(offsets, flat, type=pa.list_(pa.field("item", flat.type, nullable=False)))

    size = rollouts * tokens
    ids = [f"p{number}.0.{i}" for i in range(rollouts)]
    generation = record_batch(
        Stage.GENERATION,
        {
            "rollout_id": ids,
            "ticket_id": [number] * rollouts,
            "redraw": [0] * rollouts,
            "prompt_id": ["0"] * rollouts,
            "role": [Role.POLICY.value] * rollouts,
            "group_index": list(range(rollouts)),
            "prompt_token_ids": lists(rng.integers(0, vocabulary, rollouts * prompt_tokens).astype(np.int32)),
            "response_token_ids": lists(rng.integers(0, vocabulary, size).astype(np.int32)),
            "behavior_logps": lists(-rng.random(size).astype(np.float32)),
            "policy_versions": lists(np.zeros(size, np.int32)),
            "loss_mask": lists(np.ones(size, bool)),
            "turn_rewards": [[]] * rollouts,
            "turn_ends": [[]] * rollouts,
            "v_star": [None] * rollouts,
            "finish_reason": ["length"] * rollouts,
            "text": [""] * rollouts,
            "temperature": [1.0] * rollouts,
            "top_p": [1.0] * rollouts,
            "top_k": [0] * rollouts,
            "max_new_tokens": [tokens] * rollouts,
            "engine": ["none"] * rollouts,
            "generation_started_s": [0.0] * rollouts,
            "generation_finished_s": [0.0] * rollouts,
        },
    )
    grades: dict[str, Any] = {
        "rollout_id": ids,
        "reward": rng.random(rollouts),
        "verdict": ["correct"] * rollouts,
        "reason": [None] * rollouts,
        "preference": [None] * rollouts,
        "components": [[]] * rollouts,
        "grader": ["none"] * rollouts,
        "grading_started_s": [0.0] * rollouts,
        "grading_finished_s": [0.0] * rollouts,
    }
    scores = {
        "rollout_id": ids,
        "ref_logps": lists(-rng.random(size).astype(np.float32)),
        "ref_version": [0] * rollouts,
        "reference_started_s": [0.0] * rollouts,
        "reference_finished_s": [0.0] * rollouts,
    }
    return generation, record_batch(Stage.GRADING, grades), record_batch(Stage.REFERENCE, scores)


def timed(work: Callable[[], Any], size: int) -> tuple[Any, float, float]:
    """What the work returns, its bytes per second, and the bytes it left allocated or used in passing, over `size`."""
    began = time.perf_counter()
    result = work()
    took = time.perf_counter() - began
    del result
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    tracemalloc.start()
    result = work()
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, size / took, (pool.bytes_allocated() - before + numpy_peak) / size


def in_shared_memory(batches: list[pa.RecordBatch]) -> float:
    """Share of the batches' bytes that lie in a mapping of the object store."""
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "plasma" in line or "/dev/shm" in line:
            start, _, end = line.split()[0].partition("-")
            regions.append((int(start, 16), int(end, 16)))
    buffers = [b for batch in batches for column in batch.columns for b in column.buffers() if b is not None and b.size]
    shared = sum(b.size for b in buffers if any(start <= b.address < end for start, end in regions))
    return shared / sum(b.size for b in buffers)


def repetition(batch: list[Rows]) -> dict[str, Any]:
    """Every step once over the whole batch."""
    every = [rows for stages in batch for rows in stages]
    size = sum(rows.nbytes for rows in every)
    stages = [Stage.GENERATION, Stage.GRADING, Stage.REFERENCE]
    source = np.ones(size, np.uint8)
    target = np.empty(size, np.uint8)
    speed: dict[str, float] = {}
    copies: dict[str, float] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        result, speed[name], copies[name] = timed(work, size)
        return result

    step("memory_copy", lambda: np.copyto(target, source))
    step("validate", lambda: [validate(s, r) for rows in batch for s, r in zip(stages, rows, strict=True)])
    refs = step("put", lambda: [ray.put(rows) for rows in every])
    got = step("get", lambda: ray.get(refs))
    tickets = [tuple(got[i : i + 3]) for i in range(0, len(got), 3)]
    step("join", lambda: [join(*rows) for rows in tickets])
    step("pack", lambda: training_batch(tickets, 0))
    few = batch[0][0].slice(8, 4)
    written = len(pickle.dumps(pa.concat_batches([few]), protocol=5))
    return {
        "bytes": size,
        "gigabytes_per_s": {name: round(value / 1e9, 3) for name, value in speed.items()},
        "copies": {name: round(value, 3) for name, value in copies.items() if name != "memory_copy"},
        "shared": in_shared_memory(got),
        "slice": written / few.nbytes,
        "put_of_slice_without_compaction": len(pickle.dumps(few, protocol=5)) / few.nbytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tickets", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    rng = np.random.default_rng(0)
    batch = [ticket(i, arguments.rollouts, arguments.tokens, rng) for i in range(arguments.tickets)]
    repetition(batch)  # the first touches fresh memory everywhere
    results = []
    for number in range(arguments.repetitions):
        results.append(repetition(batch))
        print(json.dumps({"repetition": number, **results[-1]}), flush=True)

    def median(table: str) -> dict[str, float]:
        return {name: statistics.median(r[table][name] for r in results) for name in results[0][table]}

    speed = median("gigabytes_per_s")
    print(
        json.dumps(
            {
                "over_memory_copy": {name: round(v / speed["memory_copy"], 4) for name, v in speed.items()},
                "copies": median("copies"),
                "shared": min(r["shared"] for r in results),
                "slice": max(r["slice"] for r in results),
            }
        )
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
