"""The geometry of charts, against values worked out by hand."""

import math

import pytest

from deploy.report.charts import Series, column_plot, line_plot, linear_axis, log_axis, shorten, stacked_plot, step_axis
from deploy.report.gantt import gantt
from deploy.report.timeline import TIMELINE, Window


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], [0, 0.25, 0.5, 0.75, 1]),
        ([0.287, 0.644], [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        ([-3.0, 17.0], [-5, 0, 5, 10, 15, 20]),
        ([5.0, 5.0], [2, 4, 6, 8]),
        ([], [0, 0.25, 0.5, 0.75, 1]),
    ],
)
def test_an_axis_ends_at_round_numbers_around_its_values(values: list[float], ticks: list[float]) -> None:
    axis = linear_axis(values)
    assert list(axis.ticks) == pytest.approx(ticks)
    assert (axis.low, axis.high) == pytest.approx((ticks[0], ticks[-1]))
    assert all(axis.low <= v <= axis.high for v in values)


def test_a_logarithmic_axis_gives_each_power_of_ten_the_same_room() -> None:
    axis = log_axis([0.5, 300.0])
    assert axis.ticks == pytest.approx((0.1, 1, 10, 100, 1000))
    assert [axis(t) for t in axis.ticks] == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_steps_have_whole_numbers_at_their_axis() -> None:
    assert [t.text for t in step_axis([1, 2, 3]).across(integers=True)] == ["1", "2", "3"]
    assert [t.text for t in step_axis([7]).across(integers=True)] == ["7"]


def test_a_line_goes_through_its_values_and_stops_at_a_gap() -> None:
    plot = line_plot([Series("y", [0, 1, 2, 3], [0.0, 1.0, None, 0.5])])
    assert plot is not None
    # The box is 1000 wide and 400 high; y = 0 is its bottom.
    assert plot.lines[0].path == "M0.0 400.0h0L333.3 0.0M1000.0 200.0h0"
    assert [p.text for p in plot.lines[0].points] == ["step 0: 0", "step 1: 1", "step 3: 0.5"]


def test_the_band_is_one_standard_error_to_each_side() -> None:
    plot = line_plot([Series("y", [0, 1], [0.5, 0.5], [0.5, 0.25])])
    assert plot is not None
    assert plot.lines[0].band == "M0.0 0.0L1000.0 100.0L1000.0 300.0L0.0 400.0Z"


def test_without_a_value_there_is_no_plot() -> None:
    assert line_plot([Series("y", [0, 1], [None, None])]) is None
    assert stacked_plot([], [("a", [])]) is None
    assert column_plot([]) is None


def test_means_of_runs_have_the_standard_error_of_a_mean() -> None:
    short = shorten(Series("y", [0, 1, 2], [1.0, 3.0, None], [0.3, 0.4, None]), 2)
    assert list(short.x) == [0.5, 2]
    assert list(short.y) == [2.0, None]
    assert short.error is not None
    assert short.error[0] == pytest.approx(math.hypot(0.3, 0.4) / 2)
    assert short.error[1] is None


def test_areas_stand_on_each_other() -> None:
    plot = stacked_plot([1, 2], [("train", [1.0, 1.0]), ("wait", [1.0, 3.0])])
    assert plot is not None
    assert plot.areas == (
        ("train", "M0.0 300.0L1000.0 300.0L1000.0 400.0L0.0 400.0Z"),
        ("wait", "M0.0 200.0L1000.0 0.0L1000.0 300.0L0.0 300.0Z"),
    )


def test_calls_at_the_same_time_lie_in_rows_and_one_call_of_many_tickets_is_one_bar() -> None:
    def span(lane: str, ticket: int | None, start: float, end: float) -> dict[str, object]:
        return {"lane": lane, "ticket_id": ticket, "step": 1, "actor": None, "started_s": start, "finished_s": end}

    spans = [span("generation", 0, 0, 4), span("generation", 1, 0, 4), span("generation", 2, 5, 6)]
    spans += [span("grading", ticket, 6, 7) for ticket in range(3)] + [span("train", None, 7, 10)]
    drawn = gantt(TIMELINE.empty_table().from_pylist(spans, schema=TIMELINE), Window(1, 1, 0.0, 10.0))
    assert drawn is not None
    lanes = {lane.label: lane for lane in drawn.lanes}
    assert lanes["Generation"].rows == 2
    assert lanes["Generation"].description == (
        "Generation: 3 spans, busy 50.0\N{NO-BREAK SPACE}% of the window, at most 2 at once"
    )
    assert lanes["Grading"].paths == (("t1", "M600.0 1h100.0v8h-100.0z"),)
    assert [(label.text, label.at) for label in lanes["Learner"].labels] == [("1", 85.0)]
