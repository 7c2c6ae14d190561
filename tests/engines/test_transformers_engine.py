"""The engine over a real model: its numbers against plain forward passes, and what happens between two steps."""

import asyncio
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3ForCausalLM

from actors.engines.transformers import TransformersEngine
from distrl.errors import ConfigError, PolicyError, StageError
from distrl.sampling import Sample, SampleRequest
from distrl.weights import policy_tensors
from tests.builders import refusal, run
from tests.engines.tiny import EOS, PAD, StepGate, full_logps, request, tiny_engine, tiny_model


async def sample_all(engine: TransformersEngine, *requests: SampleRequest) -> list[list[Sample]]:
    try:
        return await asyncio.gather(*(engine.sample(r) for r in requests))
    finally:
        await engine.close()


def sample(engine: TransformersEngine, *requests: SampleRequest) -> list[list[Sample]]:
    return run(sample_all(engine, *requests))


async def refused(call: asyncio.Future | object, kind: type[BaseException] = StageError) -> str:
    with pytest.raises(kind) as caught:
        await call  # type: ignore[misc]
    assert type(caught.value) is kind
    return str(caught.value)


def assert_close(got: Sequence[float], expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logps_are_those_of_a_forward_pass_without_a_cache(temperature: float) -> None:
    model = tiny_model()
    requests = [
        request(f"r{n}", range(2, 2 + n), 5, max_new_tokens=24, temperature=temperature, stream=n)
        for n in (1, 2, 15, 16, 17)
    ]
    for r, samples in zip(requests, sample(tiny_engine(model), *requests), strict=True):
        for s in samples:
            scaled = (full_logps(model, r.prompt_token_ids, s.token_ids) / temperature).log_softmax(-1)
            assert_close(s.logps, scaled.gather(1, torch.tensor(s.token_ids)[:, None])[:, 0])


def test_logps_are_renormalized_over_the_tokens_that_top_k_leaves() -> None:
    model, r = tiny_model(), request(responses=6, max_new_tokens=12, top_k=4)
    [samples] = sample(tiny_engine(model), r)
    for s in samples:
        for logps, token, logp in zip(
            full_logps(model, r.prompt_token_ids, s.token_ids), s.token_ids, s.logps, strict=True
        ):
            best = logps.topk(4)
            assert token in best.indices
            assert logp == pytest.approx((logps[token] - best.values.logsumexp(0)).item(), abs=1e-5)


def test_a_low_temperature_takes_the_most_likely_token() -> None:
    model, r = tiny_model(), request(responses=3, max_new_tokens=20, temperature=1e-6)
    [samples] = sample(tiny_engine(model), r)
    for s in samples:
        assert s.token_ids == full_logps(model, r.prompt_token_ids, s.token_ids).argmax(-1).tolist()
        assert s.logps == pytest.approx([0.0] * len(s.logps), abs=1e-9)


def test_tokens_follow_the_policy() -> None:
    # First tokens of 4000 responses against the policy's distribution: chi-squared over 22 degrees of freedom stays
    # below 48.3 with probability 0.999, and the noise is fixed.
    model, r = tiny_model(), request(responses=4000, max_new_tokens=1)
    [samples] = sample(tiny_engine(model, slots=256), r)
    expected = 4000 * full_logps(model, r.prompt_token_ids, [0])[0].exp()
    counts = torch.tensor([s.token_ids[0] for s in samples]).bincount(minlength=len(expected))
    assert ((counts - expected) ** 2 / expected).sum() < 48.3


def test_the_end_token_ends_a_response_and_is_part_of_it() -> None:
    every_token = range(23)
    [samples] = sample(tiny_engine(eos_token_ids=every_token), request(responses=3))
    assert [(len(s.token_ids), len(s.logps), s.versions, s.finish_reason) for s in samples] == [(1, 1, [0], "stop")] * 3


def test_a_response_is_cut_at_max_new_tokens() -> None:
    [samples] = sample(tiny_engine(eos_token_ids=()), request(responses=3, max_new_tokens=7))
    assert [(len(s.token_ids), s.finish_reason) for s in samples] == [(7, "length")] * 3


def test_an_end_token_at_the_last_place_counts_as_a_stop() -> None:
    r = request(responses=64, max_new_tokens=3)
    [free] = sample(tiny_engine(eos_token_ids=()), r)
    third = free[0].token_ids[2]
    [samples] = sample(tiny_engine(eos_token_ids=(third,)), r)
    expected = []
    for s in free:
        n = s.token_ids.index(third) + 1 if third in s.token_ids else 3
        expected.append((s.token_ids[:n], "stop" if third in s.token_ids else "length"))
    assert [(s.token_ids, s.finish_reason) for s in samples] == expected
    assert expected[0][1] == "stop"


def test_a_request_may_fill_the_context_to_the_last_token() -> None:
    model, r = tiny_model(), request(prompt=[3] * 40, max_new_tokens=24)
    [samples] = sample(tiny_engine(model, eos_token_ids=()), r)
    assert [len(s.token_ids) for s in samples] == [24, 24]


def test_more_responses_than_slots_are_the_same_as_with_slots_for_all() -> None:
    r = request(responses=11, max_new_tokens=9)
    assert sample(tiny_engine(slots=2), r) == sample(tiny_engine(slots=32), r)


def switched_logps(
    old: Qwen3ForCausalLM, new: Qwen3ForCausalLM, prompt: Sequence[int], response: Sequence[int], switch: int
) -> Tensor:
    """Log-probabilities of a response whose first `switch` tokens are the old weights', one token at a time."""
    cache, logps = DynamicCache(), []
    inputs = list(prompt)
    with torch.inference_mode():
        for t, token in enumerate(response):
            model = old if t < switch else new
            logits = model(torch.tensor([inputs]), past_key_values=cache, use_cache=True).logits[0, -1]
            logps.append(logits.double().log_softmax(-1)[token])
            inputs = [token]
    return torch.stack(logps)


def test_weights_that_arrive_between_two_steps_sample_every_later_token_over_the_kept_cache() -> None:
    old, new = tiny_model(seed=1), tiny_model(seed=2)
    # A prefill gives the first token and every step one more, so 4 tokens are sampled when step 3 ends.
    gate, r = StepGate(3), request(responses=3, max_new_tokens=12)

    async def scenario() -> list[Sample]:
        engine = tiny_engine(tiny_model(seed=1), eos_token_ids=(), on_step=gate)
        sampling = asyncio.create_task(engine.sample(r))
        await gate.reached()
        loading = asyncio.create_task(engine.load(5, policy_tensors(new)))
        await asyncio.sleep(0)
        assert engine.version == 0
        gate.open()
        report = await loading
        assert (engine.version, report.version, report.sequences_in_flight) == (5, 5, 3)
        assert 0 <= report.pause_s < 1
        samples = await sampling
        await engine.close()
        return samples

    for s in run(scenario()):
        assert s.versions == [0] * 4 + [5] * 8
        assert_close(s.logps, switched_logps(old, new, r.prompt_token_ids, s.token_ids, switch=4))


def test_a_recomputed_cache_makes_every_later_token_one_of_the_version_it_names() -> None:
    old, new = tiny_model(seed=1), tiny_model(seed=2)
    # Rows of three lengths, more than are computed together; the update comes after 4 tokens of each.
    requests = [request(f"r{n}", range(2, 2 + n), 7, max_new_tokens=12, stream=n) for n in (1, 5, 17)]
    gate = StepGate(3)

    async def scenario() -> list[list[Sample]]:
        engine = tiny_engine(tiny_model(seed=1), eos_token_ids=(), slots=32, on_step=gate, update_mode="recompute")
        sampling = asyncio.gather(*(engine.sample(r) for r in requests))
        await gate.reached()
        loading = asyncio.create_task(engine.load(5, policy_tensors(new)))
        await asyncio.sleep(0)
        gate.open()
        assert (await loading).sequences_in_flight == 21
        samples = await sampling
        await engine.close()
        return samples

    for r, samples in zip(requests, run(scenario()), strict=True):
        for s in samples:
            assert set(s.versions) == {0, 5}
            by_version = {0: full_logps(old, r.prompt_token_ids, s.token_ids)}
            by_version[5] = full_logps(new, r.prompt_token_ids, s.token_ids)
            expected = [
                by_version[v][t, token] for t, (v, token) in enumerate(zip(s.versions, s.token_ids, strict=True))
            ]
            assert_close(s.logps, torch.stack(expected))


def test_a_prompt_that_was_computed_before_new_weights_is_computed_again_for_later_responses() -> None:
    new = tiny_model(seed=2)
    gate, r = StepGate(1), request(responses=4, max_new_tokens=5)

    async def scenario() -> list[Sample]:
        # Two slots: responses 2 and 3 wait while 0 and 1 are sampled.
        engine = tiny_engine(tiny_model(seed=1), eos_token_ids=(), slots=2, on_step=gate)
        sampling = asyncio.create_task(engine.sample(r))
        await gate.reached()
        loading = asyncio.create_task(engine.load(1, policy_tensors(new)))
        await asyncio.sleep(0)
        gate.open()
        await loading
        samples = await sampling
        await engine.close()
        return samples

    samples = run(scenario())
    assert [s.versions for s in samples] == [[0, 0, 1, 1, 1]] * 2 + [[1] * 5] * 2
    for s in samples[2:]:
        expected = full_logps(new, r.prompt_token_ids, s.token_ids)
        assert_close(s.logps, expected.gather(1, torch.tensor(s.token_ids)[:, None])[:, 0])


def test_weights_can_be_loaded_while_nothing_is_sampled() -> None:
    new, r = tiny_model(seed=2), request()

    async def scenario() -> list[Sample]:
        engine = tiny_engine(tiny_model(seed=1))
        report = await engine.load(3, policy_tensors(new))
        assert report.sequences_in_flight == 0
        [samples] = await sample_all(engine, r)
        return samples

    samples = run(scenario())
    [expected] = sample(tiny_engine(tiny_model(seed=2)), r)
    assert [(s.token_ids, s.logps) for s in samples] == [(s.token_ids, s.logps) for s in expected]
    assert all(set(s.versions) == {3} for s in samples)


def test_a_set_of_weights_with_one_bad_tensor_changes_none() -> None:
    r = request()

    async def scenario() -> list[Sample]:
        engine = tiny_engine(tiny_model(seed=1))
        tensors = policy_tensors(tiny_model(seed=2)) | {"model.norm.weight": torch.zeros(16)}
        assert await refused(engine.load(1, tensors), PolicyError) == (
            "policy version 1: tensor 'model.norm.weight' must have shape [32], got [16]; "
            "publish distrl.weights.policy_tensors of the same model"
        )
        [samples] = await sample_all(engine, r)
        return samples

    assert [run(scenario())] == sample(tiny_engine(tiny_model(seed=1)), r)


def test_cancelling_a_call_frees_its_slots() -> None:
    gate = StepGate(2)

    async def scenario() -> int:
        engine = tiny_engine(eos_token_ids=(), slots=1, on_step=gate)
        long = asyncio.create_task(engine.sample(request("long", responses=5, max_new_tokens=50)))
        await gate.reached()
        short = asyncio.create_task(engine.sample(request("short", responses=1, max_new_tokens=4)))
        await asyncio.sleep(0)
        long.cancel()
        await asyncio.sleep(0)
        gate.open()
        assert [len(s.token_ids) for s in await short] == [4]
        await engine.close()
        assert long.cancelled()
        return gate.steps

    # Two steps before, then three for the four tokens: none of the 250 that nobody waits for.
    assert run(scenario()) == 5


def test_an_error_in_the_thread_fails_every_call_in_flight_and_later() -> None:
    def broken(step: int) -> None:
        raise ValueError(f"boom at step {step}")

    message = "generation engine: stopped by ValueError: boom at step 1; start another one"

    async def scenario() -> None:
        engine = tiny_engine(eos_token_ids=(), slots=1, on_step=broken)
        calls = [asyncio.create_task(engine.sample(request(f"r{i}"))) for i in range(3)]
        for call in calls:
            assert await refused(call) == message
            assert isinstance(call.exception().__cause__, ValueError)
        assert await refused(engine.sample(request())) == message
        assert await refused(engine.load(1, policy_tensors(tiny_model()))) == message
        await engine.close()
        assert await refused(engine.sample(request())) == message

    run(scenario())


def test_weights_that_have_diverged_are_reported_and_not_sampled_from() -> None:
    async def scenario() -> str:
        engine = tiny_engine()
        tensors = policy_tensors(tiny_model())
        await engine.load(1, tensors | {"model.norm.weight": torch.full((32,), math.nan)})
        message = await refused(engine.sample(request(responses=2)))
        await engine.close()
        return message

    assert run(scenario()) == (
        "generation engine: stopped by StageError: next-token logits must not be NaN or +inf, got them in 2 of 2 rows; "
        "the policy has diverged: go back to an earlier checkpoint; start another one"
    )


def test_closing_fails_what_is_in_flight() -> None:
    gate = StepGate(1)

    async def scenario() -> None:
        engine = tiny_engine(eos_token_ids=(), on_step=gate)
        sampling = asyncio.create_task(engine.sample(request(max_new_tokens=50)))
        await gate.reached()
        loading = asyncio.create_task(engine.load(1, policy_tensors(tiny_model())))
        await asyncio.sleep(0)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        gate.open()
        await closing
        for call in (sampling, loading):
            assert await refused(call) == "generation engine: closed; start another one"
        assert gate.steps == 1

    run(scenario())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots": 0}, "engine slots must be >= 1, got 0; use 1 for the smallest engine"),
        ({"threads": 0}, "engine threads must be >= 1, got 0; use 1 for the smallest engine"),
        (
            {"pad_token_id": -1},
            "engine pad_token_id must be in 0..22, got -1; use the tokenizer that belongs to the model",
        ),
        (
            {"eos_token_ids": (1, 23)},
            "engine eos_token_ids must be in 0..22, got 23; use the tokenizer that belongs to the model",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, object], message: str) -> None:
    good = {"eos_token_ids": (EOS,), "pad_token_id": PAD, "slots": 1, "threads": 1}
    assert refusal(ConfigError, lambda: TransformersEngine(tiny_model(), **{**good, **arguments})) == message


def test_a_model_with_other_than_full_or_windowed_attention_is_refused() -> None:
    model = tiny_model()
    model.config.layer_types = ["linear_attention", *model.config.layer_types[1:]]
    assert refusal(ConfigError, lambda: tiny_engine(model)) == (
        "transformers engine: every layer of the model must have full or sliding-window attention, "
        "got full_attention, linear_attention; use the vLLM engine for this model"
    )


def test_an_attention_that_takes_no_mask_is_refused() -> None:
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    assert refusal(ConfigError, lambda: tiny_engine(model)) == (
        "transformers engine: the model's attention implementation must be sdpa or eager (they take a mask), "
        'got flash_attention_2; load the model with attn_implementation="sdpa"'
    )
