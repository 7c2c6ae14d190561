"""Geometry of the timeline: one lane per stage, bars packed into rows, colored by the step that trains the work."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from deploy.report.charts import Tick, linear_axis
from deploy.report.text import duration, number, percent
from deploy.report.timeline import STAGES, Window, clipped, overlap_s, spans_of

WIDTH, ROW = 1000, 10
TONES = 3
"""Steps take turns in this many colors."""
MOST_ROWS = 48
"""Work in parallel beyond this is drawn into the rows again from the first."""

_LABELS = {
    "generation": "Generation",
    "grading": "Grading",
    "reference": "Reference",
    "learner": "Learner",
    "load": "New weights loaded",
    "evaluation": "Held-out evaluation",
}

Bar = tuple[float, float, str]
"""(start, end, css class)."""


@dataclass(frozen=True, slots=True)
class Lane:
    label: str
    rows: int
    paths: tuple[tuple[str, str], ...]
    """(css class, path data) in a box of WIDTH x rows * ROW."""
    labels: tuple[Tick, ...]
    """Numbers of the steps, in percent from the left."""
    description: str


@dataclass(frozen=True, slots=True)
class StageShare:
    stage: str
    busy: str
    """Share of the window in which the stage worked."""
    beside_learner: str
    """Share of the learner's training time in which it worked."""


@dataclass(frozen=True, slots=True)
class Gantt:
    lanes: tuple[Lane, ...]
    ticks: tuple[Tick, ...]
    shares: tuple[StageShare, ...]
    window: Window
    seconds: str


def gantt(timeline: pa.Table, window: Window | None) -> Gantt | None:
    """The timeline's drawing; None where there is no window or nothing in it."""
    if window is None or not timeline.num_rows or window.end_s <= window.start_s:
        return None
    lanes = []
    for name, label in _LABELS.items():
        bars = _learner_bars(timeline) if name == "learner" else _bars(timeline, name)
        inside = [b for b in bars if b[0] < window.end_s and b[1] > window.start_s]
        if inside:
            lanes.append(_lane(label, inside, window, _step_labels(timeline, window) if name == "learner" else ()))
    length = window.end_s - window.start_s
    axis = linear_axis([0.0, length], most_ticks=7)
    ticks = tuple(Tick(round(100 * t / length, 2), number(t)) for t in axis.ticks if t <= length)
    return Gantt(tuple(lanes), ticks, _shares(timeline, window), window, duration(length))


def _bars(timeline: pa.Table, lane: str) -> list[Bar]:
    """A lane's bars; a call that served several tickets is one bar, of the first step that it served."""
    rows = timeline.filter(pc.equal(timeline["lane"], lane)).to_pylist()
    alone = lane == "generation"  # a generation call carries one ticket
    first: dict[tuple[float, float, int | None], int | None] = {}
    for row in sorted(rows, key=lambda r: (r["step"] is None, r["step"])):
        call = row["started_s"], row["finished_s"], row["ticket_id"] if alone else None
        first.setdefault(call, row["step"])
    plain = {"load": "load", "evaluation": "evaluation"}
    return [(start, end, plain.get(lane) or _tone(step)) for (start, end, _), step in sorted(first.items())]


def _learner_bars(timeline: pa.Table) -> list[Bar]:
    rows = timeline.filter(pc.is_in(timeline["lane"], pa.array(["wait", "train", "publish"]))).to_pylist()
    return [
        (r["started_s"], r["finished_s"], _tone(r["step"]) if r["lane"] == "train" else r["lane"])
        for r in sorted(rows, key=lambda r: r["started_s"])
    ]


def _tone(step: int | None) -> str:
    return "untrained" if step is None else f"t{step % TONES}"


def _lane(label: str, bars: Sequence[Bar], window: Window, labels: Sequence[Tick]) -> Lane:
    placed = [(0, *bar) for bar in bars] if labels else _pack(bars)
    rows = 1 + max(row for row, *_ in placed)
    scale = WIDTH / (window.end_s - window.start_s)
    paths: dict[str, list[str]] = {}
    for row, start, end, kind in placed:
        left = max(0.0, (start - window.start_s) * scale)
        right = min(float(WIDTH), (end - window.start_s) * scale)
        width = max(right - left, 0.6)
        # One path for all bars of a class is a tenth of the size of as many elements.
        bar = f"M{left:.1f} {row * ROW + 1}h{width:.1f}v{ROW - 2}h-{width:.1f}z"
        paths.setdefault(kind, []).append(bar)
    busy = sum(e - s for s, e in clipped([b[:2] for b in bars if b[2] != "wait"], window))
    share = percent(busy / (window.end_s - window.start_s))
    description = f"{label}: {len(bars)} spans, busy {share} of the window, at most {rows} at once"
    return Lane(label, rows, tuple((k, "".join(p)) for k, p in sorted(paths.items())), tuple(labels), description)


def _pack(bars: Sequence[Bar]) -> list[tuple[int, float, float, str]]:
    """Each bar goes into the first row that is free when it begins."""
    free: list[float] = []
    placed = []
    for i, (start, end, kind) in enumerate(bars):
        row = next((r for r, until in enumerate(free) if until <= start), len(free))
        if row == MOST_ROWS:
            row = i % MOST_ROWS
        if row == len(free):
            free.append(end)
        free[row] = max(free[row], end)
        placed.append((row, start, end, kind))
    return placed


def _step_labels(timeline: pa.Table, window: Window) -> tuple[Tick, ...]:
    """Numbers of the steps in the middle of their bars, where a bar is wide enough for one."""
    length = window.end_s - window.start_s
    ticks = []
    for row in timeline.filter(pc.equal(timeline["lane"], "train")).to_pylist():
        start, end = max(row["started_s"], window.start_s), min(row["finished_s"], window.end_s)
        if end - start > 0.05 * length:
            ticks.append(Tick(round(100 * ((start + end) / 2 - window.start_s) / length, 2), str(row["step"])))
    return tuple(ticks)


def _shares(timeline: pa.Table, window: Window) -> tuple[StageShare, ...]:
    trained = clipped(spans_of(timeline, "train"), window)
    training_s = sum(e - s for s, e in trained)
    shares = []
    for lane in (*STAGES, "train", "wait", "publish", "evaluation"):
        spans = clipped(spans_of(timeline, lane), window)
        busy = sum(e - s for s, e in spans) / (window.end_s - window.start_s)
        beside = overlap_s(trained, spans) / training_s if training_s else None
        in_turn = lane in ("train", "wait")
        label = {"train": "Learner: training", "wait": "Learner: waiting", "publish": "Learner: publishing"}.get(lane)
        if spans or lane in STAGES:
            name = label or _LABELS[lane]
            shares.append(StageShare(name, percent(busy), "" if in_turn else percent(beside)))
    return tuple(shares)
