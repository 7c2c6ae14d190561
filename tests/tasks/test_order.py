import os
import subprocess
import sys
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from distrl.tasks import Problem, prompt_index


@given(seed=st.integers(0, 2**32), size=st.integers(1, 50), epoch=st.integers(0, 5))
def test_each_epoch_is_a_permutation(seed: int, size: int, epoch: int) -> None:
    draws = range(epoch * size, (epoch + 1) * size)
    assert Counter(prompt_index(seed, d, size) for d in draws) == Counter(range(size))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(prompt_index(seed, epoch * 100 + i, 100) for i in range(100))

    # Two of these nine being equal by chance has probability 36 / 100!.
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_a_draw_does_not_depend_on_earlier_draws() -> None:
    forward = [prompt_index(7, d, 10) for d in range(100)]
    backward = [prompt_index(7, d, 10) for d in reversed(range(100))]
    assert forward == backward[::-1]


def test_prompt_id_is_the_same_in_every_process() -> None:
    code = "from distrl.tasks import Problem; print(Problem.of('31>', '13').prompt_id)"
    ids = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert ids == {Problem.of("31>", "13").prompt_id}


def test_prompt_id_separates_prompt_and_answer() -> None:
    pairs = [("a", "b"), ("ab", ""), ("", "ab"), ("b", "a"), ('a"', "b"), ('a","b', "")]
    assert len({Problem.of(*pair).prompt_id for pair in pairs}) == len(pairs)


def test_tasks_and_rewards_import_no_heavy_package() -> None:
    code = (
        "import sys, distrl.tasks, distrl.rewards; "
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'reasoning_gym', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
