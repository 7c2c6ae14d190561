"""Keeps what happened in a run: one JSON line per record in `metrics.jsonl`, and in memory for the driver."""

import json
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from distrl.messages import LoadReceipt, StepReport
from distrl.tickets import POLICY_WEIGHTS

KEPT = 10_000
"""Records kept in memory; the file has all."""


class Recorder:
    """Appends records; each has a number, a time and a kind.

    Args:
        path: the JSON Lines file; None keeps records in memory only.
        clock: seconds since the epoch.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float]) -> None:
        self._next = 0 if path is None else _take_up(path)
        self._file = None if path is None else path.open("a", buffering=1)
        self._clock = clock
        self._records: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def after(self, number: int) -> list[dict[str, Any]]:
        """The kept records with a number above `number`."""
        return [r for r in self._records if r["number"] > number]

    def event(self, kind: str, message: str, **more: object) -> None:
        self._add({"kind": kind, "message": message, **more})

    def failed_call(self, stage: str, message: str) -> None:
        """A call that failed, and is made again or given up; counted under its stage."""
        self.event("failed_call", message, stage=stage)

    def step(self, report: StepReport, rewards: Sequence[float], staleness: Sequence[int | None], tokens: int) -> None:
        """One optimizer step: the learner's metrics with the batch's mean reward and staleness.

        Args:
            staleness: None for a replayed ticket, which has no part in the figures of staleness.
        """
        ages = [age for age in staleness if age is not None]
        self._add(
            {
                "kind": "step",
                **asdict(report),
                # JSON has no NaN and no infinity.
                "metrics": {k: v if math.isfinite(v) else None for k, v in report.metrics.items()},
                "reward_mean": fmean(rewards),
                "reward_standard_deviation": pstdev(rewards),
                "staleness_mean": fmean(ages) if ages else None,
                "staleness_max": max(ages, default=None),
                "staleness_counts": {str(age): n for age, n in sorted(Counter(ages).items())},
                "replayed": len(staleness) - len(ages),
                "response_tokens": tokens,
            }
        )

    def evaluation(self, row: dict[str, object]) -> None:
        self._add({"kind": "evaluation", **row})

    def published(self, version: int, step: int, publish_s: float) -> None:
        """A version of the policy is in the policy store, so long after its step was trained."""
        self._add({"kind": "published", "version": version, "step": step, "publish_s": publish_s})

    def load(self, actor: str, receipt: LoadReceipt, weights: str = POLICY_WEIGHTS) -> None:
        self._add({"kind": "load", "actor": actor, "weights": weights, **asdict(receipt)})
        if receipt.fallback is not None:
            self.event("transport_fallback", f"{actor} took {weights} from the store: {receipt.fallback}")

    def _add(self, record: dict[str, Any]) -> None:
        record = {"number": self._next, "time_s": self._clock(), **record}
        self._next += 1
        self._records.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")


def _take_up(path: Path) -> int:
    """The number after the file's last record; half a record that a crash left at its end is removed."""
    if not path.exists():
        return 0
    last, end = b"", 0
    with path.open("r+b") as file:
        for line in file:
            if line.endswith(b"\n"):
                last, end = line, end + len(line)
        file.truncate(end)
    return int(json.loads(last)["number"]) + 1 if last else 0
