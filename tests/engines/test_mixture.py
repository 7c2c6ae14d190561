"""A policy and a reference sampled as one: log-probabilities against two plain forward passes."""

import asyncio
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from actors.engines.mixture import MixtureModel
from distrl.errors import ConfigError
from distrl.sampling import Sample, SampleRequest
from distrl.weights import policy_tensors
from tests.builders import refusal, run
from tests.engines.tiny import StepGate, full_logps, request, tiny_engine, tiny_model

POLICY, REFERENCE = 0, 1
"""Seeds."""


def mixture(share: float) -> MixtureModel:
    return MixtureModel(tiny_model(POLICY), tiny_model(REFERENCE), share)


def mixed_logps(
    share: float, r: SampleRequest, tokens: list[int], policy: Mapping[str, Tensor] | None = None
) -> Tensor:
    """[T, V] before each token, by the definition: log p = (1 - share) log pi + share log ref - log Z."""
    ours = tiny_model(POLICY)
    if policy is not None:
        ours.load_state_dict(policy, strict=False)
    both = [
        (full_logps(model, r.prompt_token_ids, tokens) / r.params.temperature).log_softmax(-1)
        for model in (ours, tiny_model(REFERENCE))
    ]
    unnormalized = (1 - share) * both[0] + share * both[1]
    return unnormalized - unnormalized.logsumexp(-1, keepdim=True)


def of_tokens(logps: Tensor, tokens: list[int]) -> Tensor:
    return logps.gather(1, torch.tensor(tokens)[:, None])[:, 0]


async def sampled(share: float, requests: list[SampleRequest]) -> list[list[Sample]]:
    engine = tiny_engine(mixture(share), slots=5)
    try:
        return list(await asyncio.gather(*(engine.sample(r) for r in requests)))
    finally:
        await engine.close()


@pytest.mark.parametrize("share", [0.125, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_recorded_logps_are_those_of_the_mixture(share: float, temperature: float) -> None:
    # More responses than slots and prompts of several lengths: slots are filled again, and moved.
    requests = [
        request(f"r{i}", range(2, 5 + 7 * i), 4, max_new_tokens=14, temperature=temperature, stream=i) for i in range(3)
    ]
    apart = 0.0
    for r, samples in zip(requests, run(sampled(share, requests)), strict=True):
        for sample in samples:
            expected = of_tokens(mixed_logps(share, r, sample.token_ids), sample.token_ids)
            torch.testing.assert_close(torch.tensor(sample.logps, dtype=torch.float64), expected, rtol=0, atol=1e-4)
            alone = of_tokens(mixed_logps(0.0, r, sample.token_ids), sample.token_ids)
            apart = max(apart, float((expected - alone).abs().max()))
    assert apart > 0.1


def test_a_mixture_of_the_reference_alone_samples_as_the_reference_does() -> None:
    async def alone() -> list[Sample]:
        engine = tiny_engine(tiny_model(REFERENCE), slots=5)
        try:
            return await engine.sample(request(responses=4, max_new_tokens=12))
        finally:
            await engine.close()

    ((mixed,), expected) = run(sampled(1.0, [request(responses=4, max_new_tokens=12)])), run(alone())
    assert mixed == expected


def test_tokens_are_mixed_and_not_whole_responses() -> None:
    # P(first token) of the normalized mixture of two-token responses also asks how likely their second tokens are.
    share, r = 0.5, request(responses=8, max_new_tokens=2)
    ours, theirs = tiny_model(POLICY), tiny_model(REFERENCE)
    first = (1 - share) * full_logps(ours, r.prompt_token_ids, [0])[0] + share * full_logps(
        theirs, r.prompt_token_ids, [0]
    )[0]
    second = torch.stack(
        [
            (
                (1 - share) * full_logps(ours, r.prompt_token_ids, [v, 0])[1]
                + share * full_logps(theirs, r.prompt_token_ids, [v, 0])[1]
            ).logsumexp(0)
            for v in range(len(first))
        ]
    )
    by_token, whole = first.log_softmax(0), (first + second).log_softmax(0)
    assert (by_token - whole).abs().max() > 0.1
    for sample in run(sampled(share, [r]))[0]:
        assert sample.logps[0] == pytest.approx(float(by_token[sample.token_ids[0]]), abs=1e-4)


def test_new_weights_are_the_policys_and_the_reference_stays() -> None:
    share = 0.25
    newer = policy_tensors(tiny_model(7))
    r = request(responses=4, max_new_tokens=20)

    async def updated() -> list[Sample]:
        gate = StepGate(6)
        engine = tiny_engine(mixture(share), eos_token_ids=(), update_mode="recompute", on_step=gate)
        try:
            sampling = asyncio.create_task(engine.sample(r))
            await gate.reached()
            loading = asyncio.create_task(engine.load(1, newer))
            await asyncio.sleep(0)
            gate.open()
            await loading
            return await sampling
        finally:
            await engine.close()

    for sample in run(updated()):
        assert set(sample.versions) == {0, 1}
        kept = sample.versions.count(0)
        old = of_tokens(mixed_logps(share, r, sample.token_ids), sample.token_ids)
        new = of_tokens(mixed_logps(share, r, sample.token_ids, newer), sample.token_ids)
        expected = torch.cat([old[:kept], new[kept:]])
        torch.testing.assert_close(torch.tensor(sample.logps, dtype=torch.float64), expected, rtol=0, atol=1e-4)


def test_models_of_other_tokens_are_refused() -> None:
    assert refusal(ConfigError, lambda: MixtureModel(tiny_model(), tiny_model(vocab_size=19), 0.5)) == (
        "the vocab_size of policy and reference must be the same to sample from a mixture of the two, got 23 and 19; "
        "take a reference of the policy's architecture"
    )
