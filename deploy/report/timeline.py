"""Which stage did what when, in a window of the run: the spans of the timeline, and how far they overlap."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from deploy.report.files import LedgerTables, Missing, Record, read_journal
from deploy.run_dir import RunDir

WINDOW_STEPS = 6
"""Optimizer steps that the timeline shows, from the middle of the run."""
WINDOW_TICKETS = 4000
"""Most tickets that the timeline shows; a window of larger batches has fewer steps."""

STAGES = ("generation", "grading", "reference")
LANES = ("generation", "grading", "reference", "wait", "train", "publish", "load", "evaluation")

TIMELINE = pa.schema(
    [
        pa.field("lane", pa.string(), nullable=False),
        pa.field("ticket_id", pa.int64()),
        pa.field("step", pa.int64()),
        pa.field("actor", pa.string()),
        pa.field("started_s", pa.float64(), nullable=False),
        pa.field("finished_s", pa.float64(), nullable=False),
    ]
)
"""One row per thing done: a ticket in a stage, or the learner in a step. `step` is the step that trains the ticket,
null where none did. Tickets that one call graded or scored together have the same times."""

Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Window:
    """A part of the run: the steps first_step to last_step, with the wait before the first."""

    first_step: int
    last_step: int
    start_s: float
    end_s: float


def choose_window(steps: pa.Table, tickets: pa.Table) -> Window | None:
    """The steps in the middle of the run, fewer where they have more than WINDOW_TICKETS tickets; None without a step.

    The middle, because the start and the end are not typical: nothing is in flight then.
    """
    if not steps.num_rows:
        return None
    rows = steps.select(["step", "time_s", "wait_s", "train_s", "held_s", "tickets"]).to_pylist()
    most = max(r["tickets"] or 1 for r in rows)
    count = max(1, min(WINDOW_STEPS, len(rows), WINDOW_TICKETS // most))
    first = (len(rows) - count) // 2
    begin, end = rows[first], rows[first + count - 1]
    start_s = begin["time_s"] - (begin["held_s"] or 0.0) - begin["train_s"] - begin["wait_s"]
    return Window(begin["step"], end["step"], start_s, end["time_s"])


def timeline(
    run_dir: RunDir,
    window: Window | None,
    steps: pa.Table,
    records: Sequence[Record],
    ledger: LedgerTables,
    missing: Missing,
) -> pa.Table:
    """The spans that touch the window, whole, in the order of lanes and times."""
    if window is None:
        return TIMELINE.empty_table()
    spans = [
        *_stage_spans(run_dir, window, ledger.tickets, missing),
        *_learner_spans(steps, ledger),
        *_load_spans(records),
        *_evaluation_spans(ledger),
    ]
    inside = [s for s in spans if s["started_s"] < window.end_s and s["finished_s"] > window.start_s]
    inside.sort(key=lambda s: (LANES.index(s["lane"]), s["started_s"], s["finished_s"], s["ticket_id"] or 0))
    return pa.Table.from_pylist(inside, schema=TIMELINE)


def _span(
    lane: str,
    started_s: float,
    finished_s: float,
    *,
    ticket_id: int | None = None,
    step: int | None = None,
    actor: str | None = None,
) -> Record:
    return {
        "lane": lane,
        "ticket_id": ticket_id,
        "step": step,
        "actor": actor,
        "started_s": started_s,
        "finished_s": finished_s,
    }


def _stage_spans(run_dir: RunDir, window: Window, tickets: pa.Table, missing: Missing) -> list[Record]:
    ready = tickets.filter(pc.is_valid(tickets.column("journal_file")))
    touching = ready.filter(
        pc.and_(
            pc.less(ready.column("issued_s"), window.end_s),
            pc.greater(ready.column("ready_s"), window.start_s),
        )
    )
    wanted = {r["ticket_id"]: r["trained_step"] for r in touching.select(["ticket_id", "trained_step"]).to_pylist()}
    times = [f"{stage}_{end}_s" for stage in STAGES for end in ("started", "finished")]
    columns = ["ticket_id", "role", "group_index", "engine", "grader", *times]
    rollouts = read_journal(run_dir, touching.column("journal_file").to_pylist(), columns, missing)
    if rollouts is None:
        return []
    # The rollouts of a ticket are sampled, graded and scored by the same calls.
    heads = rollouts.filter(pc.and_(pc.equal(rollouts.column("group_index"), 0), pc.equal(rollouts["role"], "policy")))
    spans = []
    for row in heads.to_pylist():
        if row["ticket_id"] not in wanted:
            continue
        for stage, actor in zip(STAGES, (row["engine"], row["grader"], None), strict=True):
            if row[f"{stage}_started_s"] is not None:
                times_s = row[f"{stage}_started_s"], row[f"{stage}_finished_s"]
                ticket = row["ticket_id"]
                spans.append(_span(stage, *times_s, ticket_id=ticket, step=wanted[ticket], actor=actor))
    return spans


def _learner_spans(steps: pa.Table, ledger: LedgerTables) -> list[Record]:
    """A step's record is written when it is told, and says how long it waited and trained before that, and how long it
    was held after it. Its weights are published when the ledger says so; the next step may have begun."""
    published = {ledger.versions[v].step: at for v, at in ledger.published_s.items()}
    spans = []
    for row in steps.select(["step", "time_s", "wait_s", "train_s", "held_s"]).to_pylist():
        step, told_s = row["step"], row["time_s"]
        trained_s = told_s - (row["held_s"] or 0.0)
        received_s = trained_s - row["train_s"]
        spans.append(_span("wait", received_s - row["wait_s"], received_s, step=step, actor="learner"))
        spans.append(_span("train", received_s, trained_s, step=step, actor="learner"))
        if step in published:
            spans.append(_span("publish", told_s, published[step], step=step, actor="learner"))
    return spans


def _load_spans(records: Sequence[Record]) -> list[Record]:
    return [
        _span("load", r["time_s"] - r["pause_s"] - r["fetch_s"], r["time_s"], actor=r["actor"])
        for r in records
        if r["kind"] == "load"
    ]


def _evaluation_spans(ledger: LedgerTables) -> list[Record]:
    """An evaluation begins when its step's weights are published, the one before training with the first ticket."""
    began = {ledger.versions[v].step: at for v, at in ledger.published_s.items()}
    issued = ledger.tickets.column("issued_s").to_pylist()
    spans = []
    for row in ledger.evaluations.to_pylist():
        start_s = began.get(row["step"], issued[0] if issued and row["step"] == 0 else None)
        if start_s is not None:
            spans.append(_span("evaluation", start_s, row["finished_s"], step=row["step"], actor=row["name"]))
    return spans


def spans_of(table: pa.Table, lane: str) -> list[Span]:
    """(start, end) of a lane's spans, calls that served several tickets once."""
    rows = table.filter(pc.equal(table.column("lane"), lane))
    pairs = zip(rows.column("started_s").to_pylist(), rows.column("finished_s").to_pylist(), strict=True)
    return sorted(set(pairs))


def clipped(spans: Iterable[Span], window: Window) -> list[Span]:
    """The parts inside the window, merged where they overlap."""
    merged: list[Span] = []
    for start, end in sorted((max(s, window.start_s), min(e, window.end_s)) for s, e in spans):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def overlap_s(one: Sequence[Span], other: Sequence[Span]) -> float:
    """Seconds that two lists of merged spans have in common."""
    total, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0.0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total
