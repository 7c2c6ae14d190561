"""Who waits for whom: seconds of a wait divided over what happened meanwhile."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.waits import Span, Stopwatch, WaitReport, blame


def blame_by_ticks(wait: tuple[int, int], timeline: list[tuple[str, int, int]]) -> dict[str, int]:
    """Second route: look at every whole second of the wait."""
    shares: dict[str, int] = {}
    for tick in range(*wait):
        busy = [stage for stage, start, end in timeline if start <= tick < end]
        for stage in busy or ["issue"]:
            shares[stage] = shares.get(stage, 0) + 1
    return shares


@given(
    st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda x: (min(x), max(x))),
    st.lists(
        st.tuples(st.sampled_from(["generation", "grading", "reference"]), st.integers(0, 20), st.integers(0, 10)).map(
            lambda x: (x[0], x[1], x[1] + x[2])
        ),
        max_size=5,
    ),
)
@settings(max_examples=150, deadline=None)
def test_a_wait_is_divided_second_by_second(wait: tuple[int, int], timeline: list[tuple[str, int, int]]) -> None:
    assert blame(wait, timeline) == pytest.approx(blame_by_ticks(wait, timeline))


def test_what_no_stage_covers_is_issue() -> None:
    timeline: list[Span] = [("generation", 2.0, 4.0), ("grading", 4.0, 5.0), ("reference", 4.0, 6.0)]
    # Waited from 1 to 8: 1-2 and 6-8 lie outside; grading and reference overlap and both count.
    assert blame((1.0, 8.0), timeline) == {"generation": 2.0, "grading": 1.0, "reference": 2.0, "issue": 3.0}


def test_no_wait_blames_nobody() -> None:
    assert blame((3.0, 3.0), [("generation", 0.0, 9.0)]) == {}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_stopwatch_adds_up_the_time_in_which_its_condition_held() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    for now, holds in ((1.0, True), (3.0, True), (4.0, False), (9.0, False), (10.0, True)):
        clock.now = now
        watch.set(holds)
        assert watch.running == holds
    clock.now = 10.5
    assert watch.read() == 3.0 + 0.5
    watch.set(False)
    clock.now = 20.0
    assert watch.read() == watch.total_s == 3.5


def test_a_report_sums_over_waits() -> None:
    report = WaitReport()
    report.add({"grading": 1.0, "issue": 0.5})
    report.add({"grading": 2.0})
    assert report.learner_s == {"grading": 3.0, "issue": 0.5}
