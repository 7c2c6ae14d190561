"""`distrl report`: reads a run, writes its page and its data files, and says the headline numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from deploy.report.data import ReportData, count, learner_wait_fraction, read_run
from deploy.report.page import render
from deploy.report.store import write_data
from distrl.errors import RunError


@dataclass(frozen=True, slots=True)
class WrittenReport:
    page: Path
    tables: dict[str, Path]
    data: ReportData

    def headline(self) -> dict[str, Any]:
        """The report in numbers; what is not known is None."""
        data = self.data
        evaluations = data.evaluations.to_pylist()
        first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
        trained = data.tickets.filter(pc.is_valid(data.tickets["trained_step"]))
        return {
            "state": data.facts.state,
            "cause": data.facts.cause,
            "steps": data.steps.num_rows,
            "rollouts_trained": pc.sum(trained["rollouts"]).as_py() or 0,
            "reward_last": data.steps["reward_mean"].to_pylist()[-1] if data.steps.num_rows else None,
            "heldout_accuracy_first": first.get("accuracy"),
            "heldout_accuracy_last": last.get("accuracy"),
            "heldout_accuracy_last_standard_error": last.get("standard_error"),
            "learner_wait_fraction": learner_wait_fraction(data.steps),
            "max_staleness": pc.max(data.tickets["staleness"]).as_py(),
            "tickets_issued": data.tickets.num_rows,
            "tickets_dropped": count(data.tickets, "dropped"),
            "missing": data.facts.missing,
        }

    def sentence(self) -> str:
        """The headline for a terminal."""
        found = self.headline()
        words = f"run {found['state']}, {found['steps']} steps"
        if found["heldout_accuracy_last"] is not None:
            error = found["heldout_accuracy_last_standard_error"]
            words += f", held-out accuracy {found['heldout_accuracy_last']:.3f} +- {error:.3f}"
        return words

    def as_json(self) -> dict[str, Any]:
        return {
            "report": str(self.page),
            "tables": {name: str(path) for name, path in self.tables.items()},
            "headline": self.headline(),
        }


def write_report(run: Path) -> WrittenReport:
    """Writes RUN/report.html and RUN/report/*.parquet; an earlier report is replaced.

    Raises:
        RunError: `run` is no run directory, or the report cannot be written. LedgerError: the ledger is damaged.
    """
    data = read_run(run)
    page = Path(data.facts.path) / "report.html"
    aside = page.with_name("report.html.partial")
    try:
        tables = write_data(data, page.with_name("report"))
        aside.write_text(render(data), encoding="utf-8")
        aside.replace(page)
    except (OSError, pa.ArrowException) as error:
        why = getattr(error, "strerror", None) or error
        raise RunError(f"RUN: the report must be writable in {page.parent}: {why}; make room or permit it") from error
    return WrittenReport(page, tables, data)
