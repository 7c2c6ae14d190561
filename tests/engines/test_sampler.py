"""The sampler against a loop over Python floats, and at the ends of the unit interval."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from actors.engines import sampler
from actors.engines.sampler import sample_tokens
from distrl.errors import StageError
from tests.builders import refusal

LARGEST_UNIFORM = 1 - 2**-53
"""The largest number that `Generator.random` returns."""


def draw(
    logits: list[list[float]],
    uniform: list[float],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[list[int], list[float]]:
    rows = len(logits)
    tokens, logps = sample_tokens(
        torch.tensor(logits, dtype=torch.float32),
        torch.full((rows,), temperature, dtype=torch.float64),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p, dtype=torch.float64),
        torch.tensor(uniform, dtype=torch.float64),
    )
    return tokens.tolist(), logps.tolist()


def distribution(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities by definition: one token after the other, nothing vectorized."""
    scaled = [x / temperature for x in logits]
    weights = [math.exp(x - max(scaled)) for x in scaled]
    if top_k:
        smallest = sorted(weights, reverse=True)[min(top_k, len(weights)) - 1]
        weights = [w if w >= smallest else 0.0 for w in weights]
    if top_p < 1:
        reached, smallest = 0.0, math.inf
        for w in sorted(weights, reverse=True):
            if reached >= top_p * math.fsum(weights):
                break
            reached, smallest = reached + w, w
        weights = [w if w >= smallest else 0.0 for w in weights]
    return [w / math.fsum(weights) for w in weights]


# Eighths make ties, which a cut must treat alike, and leave the rest of float32 to the default generator.
LOGIT = st.one_of(st.integers(-16, 16).map(lambda n: n / 8), st.floats(-20, 20, width=32))
PARAMS = {
    "temperature": st.sampled_from([0.25, 1.0, 2.0]),
    "top_k": st.sampled_from([0, 1, 2, 3, 50]),
    "top_p": st.sampled_from([0.1, 0.5, 0.9, 1.0]),
}


@given(logits=st.lists(LOGIT, min_size=1, max_size=9), uniform=st.floats(0, LARGEST_UNIFORM), **PARAMS)
def test_token_and_logp_are_those_of_the_definition(
    logits: list[float], uniform: float, temperature: float, top_k: int, top_p: float
) -> None:
    expected = distribution(logits, temperature, top_k, top_p)
    [token], [logp] = draw([logits], [uniform], temperature=temperature, top_k=top_k, top_p=top_p)
    below = math.fsum(expected[:token])
    assert expected[token] > 0
    assert below - 1e-12 <= uniform <= below + expected[token] + 1e-12
    assert logp <= 0
    assert logp == pytest.approx(math.log(expected[token]), abs=1e-12)


def test_every_token_gets_its_probability_of_the_unit_interval() -> None:
    logits = [math.log(p) for p in (0.5, 0.25, 0.125, 0.125)]
    grid = [(i + 0.5) / 800 for i in range(800)]
    tokens, _ = draw([logits] * 800, grid)
    assert [tokens.count(v) for v in range(4)] == [400, 200, 100, 100]


def test_top_p_is_taken_of_what_top_k_left() -> None:
    # 0.5, 0.3, 0.2 cut to two is 0.625, 0.375: the first alone reaches 0.6. Of the uncut distribution it would not.
    logits = [math.log(p) for p in (0.5, 0.3, 0.2)]
    assert draw([logits], [0.99], top_k=2, top_p=0.6) == ([0], [0.0])
    assert draw([logits], [0.99], top_p=0.6)[0] == [1]


def test_tokens_as_likely_as_the_last_one_kept_are_kept() -> None:
    assert draw([[0.0, 0.0, 0.0, -1.0]], [0.99], top_k=1)[0] == [2]
    assert draw([[0.0, 0.0, 0.0, -1.0]], [0.99], top_p=0.1)[0] == [2]


@pytest.mark.parametrize("uniform", [0.0, LARGEST_UNIFORM])
@pytest.mark.parametrize("vocabulary", [3, 23, 4099])
def test_tokens_of_probability_zero_are_not_drawn_at_either_end(uniform: float, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(200, vocabulary, generator=generator)
    logits[:, 0] = -torch.inf
    logits[:, -1] = -1000.0  # exp underflows to 0
    tokens, logps = draw(logits.tolist(), [uniform] * 200)
    assert set(tokens).isdisjoint({0, vocabulary - 1})
    assert all(-100 < logp <= 0 for logp in logps)


def test_a_single_possible_token_has_logp_zero() -> None:
    assert draw([[-math.inf, 3.0, -math.inf]], [0.5]) == ([1], [0.0])
    assert draw([[1.0, 2.0, 1.9]], [0.99], top_k=1) == ([1], [0.0])


def mixed_batch(rows: int, vocabulary: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)

    def pick(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    return (
        3 * torch.randn(rows, vocabulary, generator=generator),
        pick(0.5, 1.0, 1.3).double(),
        pick(0, 0, 1, 5, 1000),
        pick(0.3, 0.8, 1.0, 1.0).double(),
        torch.rand(rows, dtype=torch.float64, generator=generator),
    )


def test_a_row_has_the_same_bits_alone_and_among_rows_with_other_params() -> None:
    batch = mixed_batch(rows=70, vocabulary=61)
    tokens, logps = sample_tokens(*batch)
    for row in range(70):
        token, logp = sample_tokens(*(argument[row : row + 1] for argument in batch))
        assert (token.item(), logp.item()) == (tokens[row].item(), logps[row].item())


@pytest.mark.parametrize(("name", "value"), [("CHUNK_ELEMENTS", 200), ("HEAD", 3)])
def test_working_in_smaller_pieces_does_not_change_a_bit(
    name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = mixed_batch(rows=50, vocabulary=61)
    tokens, logps = sample_tokens(*batch)
    monkeypatch.setattr(sampler, name, value)
    again, logps_again = sample_tokens(*batch)
    assert torch.equal(again, tokens)
    assert torch.equal(logps_again, logps)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{}, {"top_k": 2}, {"top_p": 0.5}])
def test_logits_that_are_not_finite_are_an_error(bad: float, params: dict[str, float]) -> None:
    assert refusal(StageError, lambda: draw([[0.0, 1.0], [bad, 1.0]], [0.5, 0.5], **params)) == (
        "next-token logits must not be NaN or +inf, got them in 1 of 2 rows; "
        "the policy has diverged: go back to an earlier checkpoint"
    )
