"""Streams of random numbers: the same name gives the same numbers, another name others."""

import itertools
import random

import numpy as np
import pytest

from distrl.seeding import Purpose, generator, response_seeds, sampling_noise


def counter_based_uniforms(stream: tuple[int, ...], count: int) -> list[float]:
    """Second route: the raw 64-bit words of Philox under the stream's key, the top 53 bits as a fraction."""
    key = np.random.SeedSequence(list(stream)).generate_state(2, np.uint64)
    words = np.random.Philox(key=key).random_raw(count)
    return [(int(word) >> 11) / 2**53 for word in words]


def test_number_t_of_response_g_is_the_stream_s_in_row_order() -> None:
    noise = sampling_noise((3, Purpose.SAMPLING, 17, 0), responses=4, tokens=5)
    assert noise.tolist() == np.reshape(counter_based_uniforms((3, 1, 17, 0), 20), (4, 5)).tolist()


def test_a_generator_s_stream_is_named_by_seed_purpose_and_words() -> None:
    drawn = generator(3, Purpose.TASK, 17, 2).random(4)
    assert drawn.tolist() == counter_based_uniforms((3, 4, 17, 2), 4)


def test_noise_depends_on_nobody_who_drew_before() -> None:
    first = sampling_noise((0, 1, 2, 3), 2, 3)
    np.random.default_rng(5).random(7)
    random.random()
    sampling_noise((0, 1, 2, 4), 9, 9)
    assert (sampling_noise((0, 1, 2, 3), 2, 3) == first).all()


def test_noise_is_in_the_half_open_unit_interval_and_uniform() -> None:
    noise = sampling_noise((1, 2, 3, 4), 100, 100)
    assert noise.min() >= 0
    assert noise.max() < 1
    # 10,000 draws: the mean of each tenth of them has a standard deviation of 0.003 around its share 0.1.
    shares = np.histogram(noise, bins=10, range=(0, 1))[0] / noise.size
    assert np.abs(shares - 0.1).max() < 5 * 0.003


def test_every_seed_purpose_ticket_and_redraw_has_numbers_of_its_own() -> None:
    names = itertools.product(range(4), Purpose, range(6), range(3))
    firsts = {float(sampling_noise((seed, int(p), *rest), 1, 1)[0, 0]) for seed, p, *rest in names}
    assert len(firsts) == 4 * len(Purpose) * 6 * 3


def test_a_response_s_seed_depends_on_the_stream_and_its_index_alone() -> None:
    assert response_seeds((0, 1, 5, 0), 3) == response_seeds((0, 1, 5, 0), 8)[:3]
    seeds = [seed for ticket in range(50) for redraw in range(2) for seed in response_seeds((0, 1, ticket, redraw), 16)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("words", [(1, 2), (2, 1)])
def test_the_order_of_the_words_matters(words: tuple[int, int]) -> None:
    assert generator(0, Purpose.TASK, *words).random() != generator(0, Purpose.TASK, *reversed(words)).random()


def test_a_purpose_keeps_its_number() -> None:
    """A changed number would change every run with the same seed."""
    assert {p.name: p.value for p in Purpose} == {
        "SAMPLING": 1,
        "EVALUATION": 2,
        "PROMPT_ORDER": 3,
        "TASK": 4,
        "MODEL": 5,
        "WARMUP": 6,
        "REFERENCE_SAMPLING": 7,
        "OPPONENT": 8,
    }
