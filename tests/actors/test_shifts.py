"""Sudden shifts are told once; noise, slow drift and constants are not."""

import random

from actors.shifts import ShiftWatch


def watch(values: list[float], tickets: int = 20, sigmas: float = 6.0, name: str = "reward") -> list[str]:
    told: list[str] = []
    shifts = ShiftWatch(tickets, sigmas, told.append)
    for value in values:
        shifts.observe({name: value})
    return told


def noise(mean: float, count: int, seed: int = 0, deviation: float = 0.2) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(mean, deviation) for _ in range(count)]


def test_a_sudden_shift_is_told_once_with_both_means() -> None:
    told = watch([0.25] * 40 + [1.0] * 60)
    # With k of the last 20 new: 0.75 k/20 > 6 * 0.75 sqrt(k/20 (1 - k/20) / 19), from k = 14 on.
    assert told == [
        "reward shifted from 0.25 to 0.775 between 20 tickets and the next 20; look at what graders gave, in the "
        "journal's columns components, verdict and reason"
    ]
    assert len(watch(noise(0.3, 60) + noise(0.9, 60, seed=1))) == 1


def test_a_grader_that_gives_the_same_to_everything_is_told() -> None:
    assert len(watch(noise(0.5, 60) + [0.0] * 60)) == 1


def test_noise_and_drift_are_no_shift() -> None:
    assert watch(noise(0.5, 5000)) == []
    assert watch([x + 0.0005 * i for i, x in enumerate(noise(0.2, 1000))]) == []
    assert watch([0.0] * 200) == []
    assert watch([100.0, 100.001] * 100) == []


def test_quantities_are_told_apart() -> None:
    told: list[str] = []
    shifts = ShiftWatch(10, 6.0, told.append)
    for i in range(40):
        shifts.observe({"reward": 0.5, "tokens": float(10 if i < 20 else 90)})
    assert [text.split()[0] for text in told] == ["tokens"]
