"""Geometry of the charts: numbers in, SVG path data and tick positions out. No markup, no text of the run.

Plots are drawn in a box of WIDTH x HEIGHT that the page stretches to any size; strokes keep their width, and labels are
HTML beside the box at positions in percent. So a chart is as sharp and as legible on a phone as in print.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deploy.report.text import number

WIDTH, HEIGHT = 1000, 400
MOST_POINTS = 200
"""A longer series is drawn as means of equal runs of points."""

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    """Percent from the left, or from the top."""
    text: str


@dataclass(frozen=True, slots=True)
class Point:
    path: str
    """A segment of length 0, which a round pen draws as a dot whatever the box is stretched to."""
    text: str


@dataclass(frozen=True, slots=True)
class Series:
    """Values over steps; None leaves a gap."""

    label: str
    x: Sequence[float]
    y: Values
    error: Values | None = None
    """Standard errors, drawn as a band, or as bars with `dots`."""
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    label: str
    path: str
    band: str
    bars: str
    points: tuple[Point, ...]
    dots: bool


@dataclass(frozen=True, slots=True)
class Plot:
    """What a template needs to draw a chart."""

    lines: tuple[Line, ...]
    areas: tuple[tuple[str, str], ...]
    """(label, path) of stacked areas or columns, from the bottom."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    rule: float | None = None
    """Height of a horizontal rule, in percent from the top."""
    averaged: int = 1
    """Steps that one drawn point is the mean of."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values to 0 (low end) ... 1 (high end)."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)

    def across(self, *, down: bool = False, integers: bool = False) -> tuple[Tick, ...]:
        ticks = [t for t in self.ticks if not integers or t == round(t)]
        places = [(100 * (1 - self(t) if down else self(t)), t) for t in ticks]
        return tuple(Tick(round(at, 2), number(t)) for at, t in places)


def linear_axis(values: Iterable[float], *, zero: bool = False, most_ticks: int = 5) -> Axis:
    """An axis that ends at round numbers and covers the values; with `zero` it begins at 0 or below."""
    found = list(values)
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(high) / 2 or 0.5
        low, high = (low, high + margin) if zero and low == 0 else (low - margin, high + margin)
    size = _round_up((high - low) / (most_ticks - 1))
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return Axis(first * size, last * size, tuple(i * size for i in range(first, last + 1)))


def step_axis(values: Iterable[float]) -> Axis:
    """An axis that ends where the values do, with ticks at round numbers inside."""
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    if low == high:
        return Axis(low - 0.5, high + 0.5, (low,))
    size = max(1.0, _round_up((high - low) / 4))
    ticks = [i * size for i in range(math.ceil(low / size), math.floor(high / size) + 1)]
    return Axis(low, high, tuple(ticks) or (low, high))


def log_axis(values: Iterable[float]) -> Axis:
    """An axis over whole powers of ten; all values must be > 0."""
    found = list(values)
    first, last = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / 5))
    return Axis(10.0**first, 10.0**last, tuple(10.0**i for i in range(first, last + 1, every)), logarithmic=True)


def _round_up(size: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `size`."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= size * (1 - 1e-9))


def line_plot(
    series: Sequence[Series],
    *,
    zero: bool = False,
    ratios: bool = False,
    rule: float | None = None,
    x_values: Sequence[float] = (),
) -> Plot | None:
    """Lines, or dots with error bars, over steps; None where no value is there.

    Args:
        zero: begin the axis at 0.
        ratios: the axis is logarithmic where all values are positive and span more than a factor of 50.
        rule: a value to mark by a horizontal line.
        x_values: steps that the x axis must cover beside the series' own.
    """
    runs = max((len(s.x) + MOST_POINTS - 1) // MOST_POINTS for s in series)
    shorter = [s if s.dots else shorten(s, runs) for s in series]
    reach = [v for s in shorter for v in _reach(s)]
    if not reach:
        return None
    if rule is not None:
        reach.append(rule)
    logarithmic = ratios and min(reach) > 0 and max(reach) > 50 * min(reach)
    y_axis = log_axis(reach) if logarithmic else linear_axis(reach, zero=zero)
    x_axis = step_axis([x for s in series for x in s.x] + list(x_values))
    return Plot(
        lines=tuple(_line(s, x_axis, y_axis) for s in shorter),
        areas=(),
        x_ticks=x_axis.across(integers=True),
        y_ticks=y_axis.across(down=True),
        rule=None if rule is None else round(100 * (1 - y_axis(rule)), 2),
        averaged=runs,
    )


def _reach(series: Series) -> list[float]:
    errors = series.error or [None] * len(series.y)
    return [
        value + side * (error or 0.0)
        for value, error in zip(series.y, errors, strict=True)
        if value is not None
        for side in (-1, 1)
    ]


def shorten(series: Series, run: int) -> Series:
    """Each `run` points become one: their means, and the standard error of the mean of independent points."""
    if run <= 1:
        return series
    parts = [slice(i, i + run) for i in range(0, len(series.x), run)]
    errors = None
    if series.error is not None:
        errors = [_error_of_mean(series.error[p]) for p in parts]
    return Series(series.label, [_mean(series.x[p]) or 0.0 for p in parts], [_mean(series.y[p]) for p in parts], errors)


def _mean(values: Values) -> float | None:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def _error_of_mean(errors: Values) -> float | None:
    there = [e for e in errors if e is not None]
    return math.sqrt(sum(e * e for e in there)) / len(there) if there else None


def _line(series: Series, x_axis: Axis, y_axis: Axis) -> Line:
    placed = [
        (_x(x_axis(x)), _y(y_axis(y)), x, y) if y is not None else None for x, y in zip(series.x, series.y, strict=True)
    ]
    errors = series.error or [None] * len(placed)
    points, bars, upper, lower = [], [], [], []
    for place, error in zip(placed, errors, strict=True):
        if place is None:
            continue
        px, py, x, y = place
        spread = "" if error is None else f" ± {number(error)}"
        points.append(Point(f"M{px} {py}h0", f"step {number(x)}: {number(y)}{spread}"))
        if error is not None:
            top, bottom = _y(y_axis(y + error)), _y(y_axis(y - error))
            bars.append(f"M{px} {top}V{bottom}")
            upper.append(f"{px} {top}")
            lower.append(f"{px} {bottom}")
    band = f"M{'L'.join(upper + lower[::-1])}Z" if upper and not series.dots else ""
    return Line(
        series.label,
        _joined([None if p is None else (p[0], p[1]) for p in placed]),
        band,
        "".join(bars) if series.dots else "",
        tuple(points),
        series.dots,
    )


def _joined(places: Iterable[tuple[float, float] | None]) -> str:
    """A line through the places that begins anew after every gap; a lone place is a dot."""
    parts, pen = [], "M"
    for place in places:
        if place is None:
            pen = "M"
            continue
        parts.append(f"{pen}{place[0]} {place[1]}" + ("h0" if pen == "M" else ""))
        pen = "L"
    return "".join(parts)


def stacked_plot(x: Sequence[float], layers: Sequence[tuple[str, Sequence[float]]]) -> Plot | None:
    """Areas on top of each other over steps, the first at the bottom; None without a step."""
    if not x:
        return None
    run = (len(x) + MOST_POINTS - 1) // MOST_POINTS
    short = [shorten(Series(label, x, y), run) for label, y in layers]
    steps = short[0].x
    sums = [0.0] * len(steps)
    levels = [sums]
    for layer in short:
        sums = [total + (value or 0.0) for total, value in zip(sums, layer.y, strict=True)]
        levels.append(sums)
    x_axis, y_axis = step_axis(x), linear_axis(sums, zero=True)
    xs = [_x(x_axis(s)) for s in steps]
    if len(steps) == 1:  # drawn as wide as the plot
        xs, levels = [0.0, float(WIDTH)], [level * 2 for level in levels]
    areas = []
    for layer, below, above in zip(short, levels, levels[1:], strict=False):
        top = [f"{px} {_y(y_axis(v))}" for px, v in zip(xs, above, strict=True)]
        bottom = [f"{px} {_y(y_axis(v))}" for px, v in zip(xs, below, strict=True)]
        areas.append((layer.label, f"M{'L'.join(top + bottom[::-1])}Z"))
    return Plot((), tuple(areas), x_axis.across(integers=True), y_axis.across(down=True), averaged=run)


def column_plot(columns: Sequence[tuple[str, float]]) -> Plot | None:
    """One column per label; None without columns."""
    if not columns:
        return None
    y_axis = linear_axis([value for _, value in columns], zero=True)
    slot = WIDTH / len(columns)
    areas = []
    for i, (label, value) in enumerate(columns):
        left, right, top = i * slot + slot * 0.15, (i + 1) * slot - slot * 0.15, _y(y_axis(value))
        areas.append((label, f"M{left:g} {HEIGHT}V{top}H{right:g}V{HEIGHT}Z"))
    every = math.ceil(len(columns) / 12)
    ticks = [Tick(round(100 * (i + 0.5) / len(columns), 2), label) for i, (label, _) in enumerate(columns)]
    return Plot((), tuple(areas), tuple(ticks[::every]), y_axis.across(down=True))


def _x(share: float) -> float:
    return round(WIDTH * share, 1)


def _y(share: float) -> float:
    return round(HEIGHT * (1 - share), 1)
