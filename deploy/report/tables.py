"""The tables of the page, as text."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deploy.report.data import ReportData, count
from deploy.report.text import DASH, duration, number, percent

STEP_ROWS = 20
"""Rows of the page's table of steps; steps.parquet has all."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A table: the first column heads its row."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def waits_table(data: ReportData) -> Rows:
    """The learner's time and generation's idleness; for which stage the learner waited is in the summary only."""
    steps, summary = data.steps, data.facts.summary or {}
    waits = steps["wait_s"].to_pylist()
    rows = [
        ("Learner: training", duration(sum(steps["train_s"].to_pylist())), ""),
        (
            "Learner: publishing",
            duration(sum(s or 0.0 for s in steps["publish_s"].to_pylist())),
            "held up by copying or sending weights, and by checkpoints",
        ),
        ("Learner: first wait", duration(waits[0] if waits else None), "for the run's first batch"),
        ("Learner: later waits", duration(sum(waits[1:]) if waits else None), "for all other batches"),
    ]
    by_stage = summary.get("learner_waits_s")
    if isinstance(by_stage, dict) and waits:
        for stage, seconds in sorted(by_stage.items(), key=lambda item: -item[1]):
            rows.append((f"… of its waits, for {stage}", duration(seconds), _STAGE_WORDS.get(stage, "")))
        rest = max(0.0, sum(waits) - sum(by_stage.values()))
        rows.append(("… the rest", duration(rest), "asking for the batch and fetching its rollouts"))
    if "generation_held_s" in summary:
        held = duration(summary["generation_held_s"])
        rows.append(("Generation: held back", held, "idle until the learner catches up, so that samples stay fresh"))
    return Rows(("Who", "Time", "What it means"), tuple(rows))


_STAGE_WORDS = {
    "issue": "the ticket was not issued yet, or lay between two stages",
    "generation": "the last ticket of the batch was being sampled",
    "grading": "it was being graded",
    "reference": "it was being scored by the reference",
    "journal": "it was being written to disk",
}


def evaluations_table(evaluations: pa.Table) -> Rows:
    header = ("Evaluation", "Step", "Accuracy", "± SE", "Reward", "Problems", "Without a grade", "Versions")
    rows = [
        (
            r["name"],
            number(r["step"]),
            percent(r["accuracy"]),
            percent(r["standard_error"]),
            number(r["reward_mean"]),
            number(r["problems"]),
            number(r["failed"]),
            versions(r["oldest_version"], r["newest_version"]),
        )
        for r in evaluations.to_pylist()
    ]
    return Rows(header, tuple(rows))


def versions(oldest: int | None, newest: int | None) -> str:
    """Policy versions of this run; a replayed rollout has none."""
    if oldest is None:
        return "of another run"
    return str(oldest) if oldest == newest else f"{oldest} to {newest}"


def steps_table(steps: pa.Table) -> Rows:
    columns = [
        ("Step", "step"),
        ("Reward", "reward_mean"),
        ("± SE", "reward_standard_error"),
        ("KL to behavior", "kl_behavior"),
        ("KL to reference", "kl_reference"),
        ("Entropy", "entropy"),
        ("Ratio mean", "ratio_mean"),
        ("Ratio max", "ratio_max"),
        ("ESS", "ess"),
        ("Gradient norm", "grad_norm"),
        ("Staleness mean", "staleness_mean"),
        ("Wait (s)", "wait_s"),
        ("Train (s)", "train_s"),
    ]
    present = [(label, name) for label, name in columns if name in steps.column_names]
    last = steps.num_rows - 1
    wanted = sorted({round(i * last / (STEP_ROWS - 1)) for i in range(STEP_ROWS)}) if last >= 0 else []
    rows = steps.take(pa.array(wanted, pa.int64())).to_pylist()
    return Rows(
        tuple(label for label, _ in present), tuple(tuple(number(row[name]) for _, name in present) for row in rows)
    )


def drops_table(tickets: pa.Table) -> Rows | None:
    """Dropped tickets by reason, beside the trained ones; None where none was dropped."""
    if not count(tickets, "dropped"):
        return None
    rows = [_drop_row("trained, for comparison", tickets.filter(pc.is_valid(tickets["trained_step"])))]
    dropped = tickets.filter(pc.equal(tickets["state"], "dropped"))
    for reason in sorted(set(dropped["drop_reason"].to_pylist())):
        rows.append(_drop_row(reason, dropped.filter(pc.equal(dropped["drop_reason"], reason))))
    return Rows(("Reason", "Tickets", "Sampled before", "Mean tokens of a response", "Last cause"), tuple(rows))


def _drop_row(reason: str, tickets: pa.Table) -> tuple[str, ...]:
    lengths = mean_lengths(tickets)
    details = [d for d in tickets["drop_detail"].to_pylist() if d]
    mean = number(float(np.mean(lengths))) if len(lengths) else DASH
    return reason, number(tickets.num_rows), number(len(lengths)), mean, details[-1] if details else ""


def mean_lengths(tickets: pa.Table) -> list[float]:
    """Mean response tokens of each ticket that was sampled."""
    pairs = zip(tickets["response_tokens"].to_pylist(), tickets["rollouts"].to_pylist(), strict=True)
    return [tokens / n for tokens, n in pairs if tokens is not None and n]


def drops_by_length_table(tickets: pa.Table) -> Rows | None:
    """Sampled tickets in four parts by length, and how many of each were dropped; None where none of them was."""
    sampled = tickets.filter(pc.is_valid(tickets["response_tokens"]))
    if not count(sampled, "dropped"):
        return None
    lengths = np.array(mean_lengths(sampled))
    dropped = np.array([s == "dropped" for s in sampled["state"].to_pylist()])
    edges = np.unique(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]))
    part = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(len(edges) - 2, 0))
    rows = []
    for i in range(max(len(edges) - 1, 1)):
        inside = part == i
        top = edges[min(i + 1, len(edges) - 1)]
        share = percent(float(dropped[inside].mean())) if inside.any() else DASH
        rows.append(
            (
                f"{number(edges[i])} to {number(top)}",
                number(int(inside.sum())),
                number(int(dropped[inside].sum())),
                share,
            )
        )
    return Rows(("Mean tokens of a response", "Sampled tickets", "Dropped", "Share"), tuple(rows))
