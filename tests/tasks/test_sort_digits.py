from collections import Counter

import pytest

from distrl.errors import ConfigError, DataError
from distrl.tasks import DataConfig, load_task
from distrl.tasks.sort_digits import ALPHABET, SortDigits, is_held_out, load_sort_digits


def _config(**values: object) -> DataConfig:
    return DataConfig.model_validate({"source": "sort_digits", "heldout_size": 50, **values})


def test_answer_is_the_prompts_digits_in_order() -> None:
    task = load_task(_config(train_size=200))
    for problem in [*(task.train[i] for i in range(200)), *task.heldout]:
        assert problem.prompt[-1] == ">"
        assert len(problem.prompt) == 9
        assert Counter(problem.prompt[:-1]) == Counter(problem.answer)
        assert all(a <= b for a, b in zip(problem.answer, problem.answer[1:], strict=False))
        assert set(problem.prompt + problem.answer) <= set(ALPHABET)


def test_no_permutation_of_a_held_out_problem_is_trained_on() -> None:
    # By construction: one predicate of the sorted digits decides the split, whatever the seed.
    for seed in range(3):
        task = load_task(_config(seed=seed, train_size=1000))
        assert not any(is_held_out(task.train[i].answer) for i in range(1000))
        assert all(is_held_out(problem.answer) for problem in task.heldout)


def test_one_multiset_in_ten_is_held_out() -> None:
    # Of C(11, 2) = 55 multisets of two digits, the fewest with any held out at all, both splits have some ...
    two = [f"{a}{b}" for a in range(10) for b in range(a, 10)]
    assert 0 < sum(map(is_held_out, two)) < 55
    # ... and of the 10^4 numbers with four digits, about a tenth: sd is at most sqrt(0.09 x 715 multisets) x 24.
    four = ["".join(sorted(f"{n:04d}")) for n in range(10_000)]
    assert sum(map(is_held_out, four)) == pytest.approx(1000, abs=4 * 8.1 * 24)


def test_problem_is_a_function_of_seed_and_index() -> None:
    one, two = SortDigits(8, 100, seed=3), SortDigits(8, 5000, seed=3)
    backwards = [two[i] for i in reversed(range(100))]
    assert [one[i] for i in range(100)] == backwards[::-1]
    other = SortDigits(8, 100, seed=4)
    assert not {one[i].prompt for i in range(100)} & {other[i].prompt for i in range(100)}


def test_held_out_problems_are_distinct() -> None:
    heldout = load_task(_config(heldout_size=500)).heldout
    assert len({problem.prompt for problem in heldout}) == len({p.prompt_id for p in heldout}) == 500


def test_digits_option_sets_the_length() -> None:
    assert len(load_task(_config(options={"digits": 3})).train[0].answer) == 3


def test_sizes_are_those_of_the_config_or_the_documented_defaults() -> None:
    task = load_sort_digits(_config(train_size=7))
    assert (len(task.train), len(task.heldout)) == (7, 50)
    default = load_sort_digits(DataConfig())
    assert (len(default.train), len(default.heldout)) == (100_000, 1024)
    assert default.default_reward == "exact"


def test_index_outside_the_training_set_is_refused() -> None:
    with pytest.raises(IndexError, match=r"^problem index must be in \[0, 5\), got 5$"):
        SortDigits(8, 5, 0)[5]


@pytest.mark.parametrize("digits", [1, 65, True, "8", 8.0])
def test_number_of_digits_out_of_range_is_refused(digits: object) -> None:
    with pytest.raises(ConfigError) as error:
        load_task(_config(options={"digits": digits}))
    assert str(error.value) == (
        f"data.options.digits must be an integer from 2 to 64, got {digits!r}; 8 is the default"
    )


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        load_task(_config(options={"length": 5}))
    assert str(error.value) == ("data.options.length is not an option of sort_digits, got 5; the only one is digits")


def test_more_held_out_problems_than_exist_are_refused() -> None:
    # Two digits have 100 prompts, so that 50 in a tenth of the multisets cannot be.
    with pytest.raises(DataError) as error:
        load_task(_config(options={"digits": 2}))
    held_out = sum(is_held_out("".join(sorted(f"{n:02d}"))) for n in range(100))
    assert str(error.value) == (
        f"data.heldout_size must be at most the number of distinct held-out problems, got 50 but 2 digits gave only "
        f"{held_out} in 1000 draws; lower it or raise data.options.digits"
    )
