"""The metrics over time as Parquet: a directory of files that is read as one table."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from prometheus_client import CollectorRegistry

FLUSH_ROWS = 50_000
FLUSH_S = 600.0
"""A part is written after this many rows or seconds; what is not written yet is lost if the process is killed, and
metrics.jsonl, from which it came, is not."""

SCHEMA = pa.schema(
    [
        pa.field("time_s", pa.float64(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("labels", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)
"""One row per series and step: the name and labels that Prometheus shows, `labels` as `a=b,c=d`."""

Reading = tuple[str, str, float]
"""Name, labels, value of a series."""


def readings(registry: CollectorRegistry) -> list[Reading]:
    """The present value of every series."""
    return [
        (sample.name, ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items())), float(sample.value))
        for family in registry.collect()
        for sample in family.samples
    ]


class History:
    """Appends readings to a directory of Parquet files; each is complete or absent.

    Args:
        directory: made if needed; parts of an earlier process stay.
        clock: seconds, monotonic.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        directory.mkdir(exist_ok=True)
        self._directory = directory
        self._clock = clock
        self._next = 1 + max((int(p.stem.partition("-")[2]) for p in directory.glob("part-*.parquet")), default=-1)
        self._rows: list[tuple[float, int, str, str, float]] = []
        self._flushed_s = clock()

    def add(self, time_s: float, step: int, values: Iterable[Reading]) -> None:
        self._rows += [(time_s, step, *value) for value in values]
        if len(self._rows) >= FLUSH_ROWS or self._clock() - self._flushed_s >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        self._flushed_s = self._clock()
        if not self._rows:
            return
        columns = zip(*self._rows, strict=True)
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
        path = self._directory / f"part-{self._next:06d}.parquet"
        aside = path.with_name(f".{path.name}.partial")  # readers of the directory pass over hidden files
        pq.write_table(table, aside)
        aside.replace(path)
        self._next += 1
        self._rows = []
