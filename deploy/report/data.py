"""The data of a report: a run directory as tables and facts. Pure: the same files give the same data."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from deploy.report.files import (
    Missing,
    Record,
    open_run,
    read_config,
    read_json,
    read_ledger,
    read_records,
)
from deploy.report.samples import choose_samples
from deploy.report.timeline import Window, choose_window, timeline

FORMAT = 1
"""Version of the report's tables and facts."""

STEP_FIELDS = [
    pa.field("step", pa.int64(), nullable=False),
    pa.field("time_s", pa.float64()),
    pa.field("reward_mean", pa.float64()),
    pa.field("reward_standard_error", pa.float64()),
    pa.field("tickets", pa.int64()),
    pa.field("rollouts", pa.int64()),
    pa.field("response_tokens", pa.int64()),
    pa.field("staleness_mean", pa.float64()),
    pa.field("staleness_max", pa.int64()),
    pa.field("wait_s", pa.float64()),
    pa.field("train_s", pa.float64()),
    pa.field("publish_s", pa.float64()),
    pa.field("held_s", pa.float64()),
]
"""The fixed columns of `steps`; every metric of the objective follows under its own name."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the report says beside its tables; all of it JSON."""

    name: str
    path: str
    written_s: float
    """When the report was made, seconds since the epoch."""
    state: str
    """finished, stopped, failed, open (running, or ended without a word) or empty (no record yet)."""
    cause: str | None
    """Of a failed run."""
    first_s: float | None
    last_s: float | None
    """When the run's first and last records or tickets were written."""
    config_text: str
    config: Record
    summary: Record | None
    """summary.json, which a run writes at its end."""
    window: Window | None
    """The part of the run that `timeline` covers."""
    checkpoints: int
    failed_calls: int
    missing: list[str]
    """What could not be read, or was not recorded, in sentences."""

    def setting(self, name: str) -> Any:
        """The config's value of a dotted name; None where the config has no such key."""
        at: Any = self.config
        for key in name.split("."):
            at = at.get(key) if isinstance(at, dict) else None
        return at


@dataclass(frozen=True, slots=True)
class ReportData:
    """All that the page shows."""

    facts: Facts
    steps: pa.Table
    """One row per optimizer step; where a step was repeated after a rollback, the last time counts."""
    evaluations: pa.Table
    tickets: pa.Table
    """The ledger's tickets, times in seconds since the epoch."""
    timeline: pa.Table
    samples: pa.Table

    def tables(self) -> dict[str, pa.Table]:
        return {
            "steps": self.steps,
            "evaluations": self.evaluations,
            "tickets": self.tickets,
            "timeline": self.timeline,
            "samples": self.samples,
        }


def read_run(path: Path, clock: Callable[[], float] = time.time) -> ReportData:
    """Reads a run directory; the run may go on meanwhile.

    Raises:
        RunError: `path` is no run directory. LedgerError: its ledger is damaged or of a newer format.
    """
    run_dir, run = open_run(path)
    missing = Missing()
    config_text, config = read_config(run_dir.config, missing)
    records = read_records(run_dir.metrics, missing)
    ledger = read_ledger(run_dir.ledger, missing)
    summary = read_json(run_dir.summary) if run_dir.summary.is_file() else None
    steps = step_table(records, ledger.tickets)
    window = choose_window(steps, ledger.tickets)
    spans = timeline(run_dir, window, steps, records, ledger, missing)
    samples = choose_samples(run_dir, config, ledger, missing)
    state, cause = _state(records, summary)
    _note_absent(state, summary, steps, missing)
    times = [r["time_s"] for r in records] + ledger.tickets.column("issued_s").to_pylist()
    facts = Facts(
        name=str(run.get("name", run_dir.path.name)),
        path=str(run_dir.path),
        written_s=clock(),
        state=state,
        cause=cause,
        first_s=min(times, default=None),
        last_s=max(times, default=None),
        config_text=config_text,
        config=config,
        summary=summary,
        window=window,
        checkpoints=ledger.checkpoints,
        failed_calls=sum(r["kind"] == "failed_call" for r in records),
        missing=missing.notes,
    )
    return ReportData(facts, steps, ledger.evaluations, ledger.tickets, spans, samples)


def _state(records: Sequence[Record], summary: Record | None) -> tuple[str, str | None]:
    failures = [str(r["message"]) for r in records if r["kind"] == "failed"]
    if summary is not None:
        return str(summary["state"]), None
    if failures:
        return "failed", failures[0]
    return ("open" if records else "empty"), None


def _note_absent(state: str, summary: Record | None, steps: pa.Table, missing: Missing) -> None:
    if summary is None:
        missing.add(
            "summary.json is not there: a run writes it when it finishes. For which stage the learner waited, and how "
            "long generation was held back, is known only then."
        )
    if state != "empty" and not steps.num_rows:
        missing.add("No optimizer step has been recorded.")


def step_table(records: Sequence[Record], tickets: pa.Table) -> pa.Table:
    """The `steps` table.

    Args:
        records: of metrics.jsonl.
        tickets: of the ledger; gives the number of tickets and rollouts of each step, and the standard error of its
            mean reward over tickets, whose rollouts share a prompt and are not independent of each other.
    """
    last = {int(r["step"]): r for r in records if r["kind"] == "step"}
    steps = [last[number] for number in sorted(last)]
    columns = {f.name: pa.array([r.get(f.name) for r in steps], f.type) for f in STEP_FIELDS}
    by_step = _by_step(tickets)
    for name in ("tickets", "rollouts", "reward_standard_error"):
        values = [by_step.get(int(r["step"]), {}).get(name) for r in steps]
        columns[name] = pa.array(values, columns[name].type)
    # A step's record is written before its weights are published; the next record has the seconds.
    published = [last.get(int(r["step"]) + 1, {}).get("last_publish_s") for r in steps]
    columns["publish_s"] = pa.array(published, pa.float64())
    for name in dict.fromkeys(name for r in steps for name in r["metrics"]):
        key = f"metric_{name}" if name in columns else name
        columns[key] = pa.array([_number(r["metrics"].get(name)) for r in steps], pa.float64())
    return pa.table(columns)


def _by_step(tickets: pa.Table) -> dict[int, Mapping[str, Any]]:
    trained = tickets.filter(pc.is_valid(tickets.column("trained_step")))
    groups = trained.group_by("trained_step").aggregate(
        [
            ("ticket_id", "count"),
            ("rollouts", "sum"),
            ("reward_mean", "stddev", pc.VarianceOptions(ddof=1)),
        ]
    )
    found: dict[int, Mapping[str, Any]] = {}
    for row in groups.to_pylist():
        n, spread = row["ticket_id_count"], row["reward_mean_stddev"]
        error = None if spread is None or math.isnan(spread) else spread / math.sqrt(n)
        found[row["trained_step"]] = {
            "tickets": n,
            "rollouts": row["rollouts_sum"],
            "reward_standard_error": error,
        }
    return found


def _number(value: object) -> float | None:
    """NaN and infinities become null: neither a chart nor a mean can use them."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def learner_wait_fraction(steps: pa.Table) -> float | None:
    """Share of the learner's time between its first batch and its last step that it waited; as in summary.json."""
    if not steps.num_rows:
        return None
    waited = sum(steps["wait_s"].to_pylist()[1:])
    busy = sum(steps["train_s"].to_pylist()) + sum(s or 0.0 for s in steps["publish_s"].to_pylist())
    return waited / (waited + busy) if waited + busy else None


def count(tickets: pa.Table, state: str) -> int:
    """Tickets in a state."""
    return int(pc.sum(pc.equal(tickets["state"], state)).as_py() or 0)
