"""The charts of the page: which columns they draw, and what they say in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from deploy.report.charts import Plot, Series, column_plot, line_plot, stacked_plot
from deploy.report.data import ReportData
from deploy.report.text import number, percent


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    note: str
    """What is drawn, in which unit."""
    plot: Plot | None
    description: str
    """The chart in words, for who cannot see it; or why there is none."""
    legend: tuple[str, ...] = ()
    x_label: str = "step"


def _column(table: pa.Table, name: str) -> list[Any]:
    return list(table[name].to_pylist()) if name in table.column_names else []


def _in_words(label: str, x: Sequence[float], y: Sequence[float | None]) -> str:
    there = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    if not there:
        return f"{label}: no values"
    (x0, y0), (x1, y1) = there[0], there[-1]
    values = [b for _, b in there]
    ends = f"{number(y0)} at step {number(x0)}, {number(y1)} at step {number(x1)}"
    return f"{label}: {ends}, between {number(min(values))} and {number(max(values))}"


def reward_chart(steps: pa.Table) -> Chart:
    x, y = _column(steps, "step"), _column(steps, "reward_mean")
    series = Series("reward", x, y, _column(steps, "reward_standard_error"))
    note = "Mean over the batch; the band is ± 1 standard error over its prompts."
    words = _in_words("Reward", x, y) if x else "No step has been recorded."
    return Chart("Reward of the trained rollouts", note, line_plot([series]) if x else None, words)


def accuracy_chart(data: ReportData) -> Chart:
    evaluations = data.evaluations.sort_by([("step", "ascending"), ("evaluation", "ascending")])
    x, y = _column(evaluations, "step"), _column(evaluations, "accuracy")
    errors = _column(evaluations, "standard_error")
    series = Series("accuracy", x, y, errors, dots=True)
    note = "Share of held-out problems solved by one sampled response each; bars are ± 1 standard error."
    words = _in_words("Held-out accuracy", x, y) if x else "No evaluation has finished."
    plot = line_plot([series], x_values=_column(data.steps, "step")) if x else None
    return Chart("Held-out accuracy", note, plot, words)


def _metric(
    steps: pa.Table,
    title: str,
    note: str,
    lines: Sequence[tuple[str, str]],
    *,
    zero: bool = False,
    ratios: bool = False,
    rule: float | None = None,
) -> Chart:
    """Args: lines: (column, label) of each."""
    x = _column(steps, "step")
    series = [Series(label, x, _column(steps, column)) for column, label in lines if column in steps.column_names]
    plot = line_plot(series, zero=zero, ratios=ratios, rule=rule) if series and x else None
    if plot is None:
        names = " and ".join(column for column, _ in lines)
        return Chart(title, note, None, f"Not recorded: the steps of this run have no {names}.")
    words = "; ".join(_in_words(s.label, s.x, s.y) for s in series)
    return Chart(title, note, plot, words, tuple(s.label for s in series) if len(series) > 1 else ())


def health_charts(data: ReportData) -> tuple[Chart, ...]:
    steps = data.steps
    clip = data.facts.setting("train.max_grad_norm")
    rule = float(clip) if isinstance(clip, int | float) else None
    return (
        _metric(
            steps,
            "KL to the behavior policy",
            "Mean log(behavior / policy) per token, in nats: how far the learner is from what sampled its batch.",
            [("kl_behavior", "KL to behavior")],
        ),
        _metric(
            steps,
            "KL to the reference",
            "Mean log(policy / reference) per token of the sampled responses, in nats.",
            [("kl_reference", "KL to reference")],
        ),
        _metric(steps, "Entropy", "Of the policy per token, in nats.", [("entropy", "entropy")]),
        _metric(
            steps,
            "Importance ratios",
            "policy / behavior per token, over the batch; 1 is on-policy.",
            [("ratio_mean", "mean"), ("ratio_max", "max")],
            ratios=True,
        ),
        _metric(
            steps,
            "Effective sample size",
            "Of the sequence ratios, as a share of the batch: 1 when all responses weigh the same.",
            [("ess", "effective sample size")],
        ),
        _metric(
            steps,
            "Gradient norm",
            f"Before clipping to {number(rule)} (dashed)." if rule else "Before clipping.",
            [("grad_norm", "gradient norm")],
            zero=True,
            rule=rule if "grad_norm" in steps.column_names else None,
        ),
        _length(steps),
        _seconds(steps),
        _staleness(data.tickets),
    )


def _length(steps: pa.Table) -> Chart:
    pairs = zip(_column(steps, "response_tokens"), _column(steps, "rollouts"), strict=True)
    y = [tokens / n if tokens is not None and n else None for tokens, n in pairs]
    x = _column(steps, "step")
    plot = line_plot([Series("tokens", x, y)]) if x else None
    words = _in_words("Response length", x, y) if x else "No step has been recorded."
    return Chart("Response length", "Mean tokens of a trained response.", plot, words)


def _seconds(steps: pa.Table) -> Chart:
    x = _column(steps, "step")
    names = (("train_s", "training"), ("publish_s", "publishing"), ("wait_s", "waiting"))
    layers = [(label, [v or 0.0 for v in _column(steps, name)]) for name, label in names]
    words = "; ".join(_in_words(label, x, values) for label, values in layers) if x else "No step has been recorded."
    note = "Where the learner's time went; publishing includes checkpoints."
    return Chart("Seconds per step", note, stacked_plot(x, layers), words, tuple(label for label, _ in layers))


def _staleness(tickets: pa.Table) -> Chart:
    counts = staleness_counts(tickets)
    total = sum(counts.values())
    note = "Trained rollouts by optimizer steps between the oldest version that sampled their ticket and the learner's."
    if not total:
        return Chart("Staleness", note, None, "No rollout has been trained.", x_label="optimizer steps")
    columns = [(number(age), 100 * counts.get(age, 0) / total) for age in range(max(counts) + 1)]
    words = "; ".join(f"{age} steps: {number(counts[age])} rollouts ({percent(counts[age] / total)})" for age in counts)
    return Chart("Staleness", note + " In percent of all.", column_plot(columns), words, x_label="optimizer steps")


def staleness_counts(tickets: pa.Table) -> dict[int, int]:
    """Trained rollouts by the staleness of their ticket, from the freshest."""
    trained = tickets.filter(pc.is_valid(tickets["staleness"]))
    rows = trained.group_by("staleness").aggregate([("rollouts", "sum")]).sort_by("staleness").to_pylist()
    return {row["staleness"]: row["rollouts_sum"] for row in rows}
