"""The same request gives the same bits, whatever else the decoder does: the promise of `actors.engines.decode`."""

import random
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import Qwen3ForCausalLM

from actors.engines.cache import SlotCache
from actors.engines.decode import Decoder
from actors.engines.rows import Job
from distrl.sampling import Sample, SampleRequest
from distrl.seeding import sampling_noise
from tests.engines.tiny import CONTEXT, EOS, PAD, request, tiny_model

REQUESTS = 14


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def requests() -> list[SampleRequest]:
    """Prompts of 1 to 41 tokens and responses of up to 20, over the edges of three position buckets."""
    rng = random.Random(0)
    return [
        request(
            f"r{i}",
            [rng.randrange(2, 23) for _ in range(1 + 40 * i // (REQUESTS - 1))],
            rng.choice((1, 2, 3, 8)),
            max_new_tokens=rng.randint(1, 20),
            temperature=rng.choice((0.7, 1.0, 1.5)),
            top_p=rng.choice((0.8, 1.0, 1.0)),
            top_k=rng.choice((0, 0, 5)),
            stream=i,
        )
        for i in range(REQUESTS)
    ]


def decode(model: Qwen3ForCausalLM, arrivals: list[list[SampleRequest]], slots: int) -> dict[str, list[Sample]]:
    """Responses by request, when `arrivals[s]` are submitted before step s."""
    eos = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    eos[EOS] = True
    decoder = Decoder(model, context_length=CONTEXT, eos_V=eos, pad_token_id=PAD, slots=slots, version=0)
    done: dict[str, list[Sample]] = {}
    with torch.inference_mode():
        while arrivals or decoder.busy:
            for r in arrivals[0] if arrivals else ():
                decoder.submit(Job(r, sampling_noise(r.stream, r.responses, r.params.max_new_tokens)))
            arrivals = arrivals[1:]
            for job in decoder.step():
                done[job.request.request_id] = [job.samples[g] for g in range(job.request.responses)]
    return done


SHAPES = {
    "odd sizes": {},
    "one head of 64": {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64},
    "quickstart": {"hidden_size": 128, "intermediate_size": 384, "num_key_value_heads": 4, "head_dim": 32},
}


@pytest.fixture(scope="module", params=SHAPES)
def alone(request: pytest.FixtureRequest) -> tuple[Qwen3ForCausalLM, dict[str, list[Sample]]]:
    """A model, and the responses to each request when nothing runs beside it."""
    torch.set_num_threads(1)
    model = tiny_model(**SHAPES[request.param])
    results: dict[str, list[Sample]] = {}
    for r in requests():
        results |= decode(model, [[r]], slots=8)
    return model, results


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(range(REQUESTS)),
    gaps=st.lists(st.integers(0, 5), min_size=REQUESTS, max_size=REQUESTS),
    slots=st.sampled_from([1, 3, 8, 33, 70]),
)
def test_neighbors_slots_and_arrival_order_do_not_change_a_bit(
    alone: tuple[Qwen3ForCausalLM, dict[str, list[Sample]]], order: list[int], gaps: list[int], slots: int
) -> None:
    model, expected = alone
    every = requests()
    arrivals: list[list[SampleRequest]] = [[]]
    for i, gap in zip(order, gaps, strict=True):
        arrivals += [[] for _ in range(gap)]
        arrivals[-1].append(every[i])
    assert decode(model, arrivals, slots) == expected


def test_rows_that_move_to_other_slots_do_not_change_a_bit(
    alone: tuple[Qwen3ForCausalLM, dict[str, list[Sample]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 60 short responses before 10 long ones: when the short ones have ended, the long ones move from slots 60..69 down.
    model, _ = alone
    short = [request(f"s{i}", responses=6, max_new_tokens=3, stream=100 + i) for i in range(10)]
    long = [request(f"l{i}", responses=5, max_new_tokens=30, stream=200 + i) for i in range(2)]
    moves = []

    class CountingCache(SlotCache):
        def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
            moves.append(len(sources))
            super().move(sources, targets)

    expected: dict[str, list[Sample]] = {}
    for r in (*short, *long):
        expected |= decode(model, [[r]], slots=8)
    monkeypatch.setattr("actors.engines.decode.SlotCache", CountingCache)
    assert decode(model, [[*short, *long]], slots=70) == expected
    assert moves


def test_a_prompt_beside_longer_prompts_gives_the_same_bits() -> None:
    model = tiny_model()
    target = request("target", [4, 5, 6], responses=3, max_new_tokens=5, stream=7)
    longer = [request(f"long{n}", [9] * n, 1, max_new_tokens=2, stream=n) for n in (17, 33, 50)]
    expected = decode(model, [[target]], slots=8)["target"]
    for others in (longer[:1], longer[1:2], longer):
        assert decode(model, [[target, *others]], slots=8)["target"] == expected
