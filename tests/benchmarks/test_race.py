"""The time to a target is read off a curve of measurements."""

import pytest

from benchmarks.race import ratios, reached

CURVE = [(0.0, 0.2), (10.0, 0.4), (20.0, 0.8), (30.0, 0.7)]


@pytest.mark.parametrize(("target", "seconds"), [(0.2, 0.0), (0.3, 5.0), (0.4, 10.0), (0.7, 17.5), (0.8, 20.0)])
def test_the_time_lies_on_the_line_between_the_measurements_around_the_target(target: float, seconds: float) -> None:
    assert reached(CURVE, target) == pytest.approx(seconds)


def test_a_target_that_is_not_reached_has_no_time_and_counts_for_no_ratio() -> None:
    assert reached(CURVE, 0.9) is None
    slower = [(2 * seconds, accuracy) for seconds, accuracy in CURVE]
    found = ratios([{"distrl": CURVE, "trl": slower}, {"distrl": CURVE[:2], "trl": slower}], 0.6)
    assert found == {
        "target": 0.6,
        "reached": {"distrl": 1, "trl": 2},
        "trl_over_distrl_s": 2.0,
        "seconds": [{"distrl": 15.0, "trl": 30.0}, {"distrl": None, "trl": 30.0}],
    }
