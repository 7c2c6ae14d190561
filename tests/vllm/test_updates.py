"""New weights in the middle of vLLM's decoding: nothing is lost, and log-probabilities are what the mode promises."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.generation import Generation
from distrl.errors import PolicyError
from distrl.manifest import cut, describe, lay_out
from distrl.sampling import Sample, SampleRequest, SamplingParams, UpdateMode
from distrl.tickets import POLICY_WEIGHTS
from distrl.weights import policy_tensors
from tests.engines.tiny import full_logps, request

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs these tests")

if TYPE_CHECKING:
    from tests.vllm.shared import OnLoop, SharedVllm


def run(coroutine: object) -> object:
    return asyncio.run(asyncio.wait_for(coroutine, 120))  # type: ignore[arg-type]


def new_weights(step: float = 0.05) -> dict[str, Tensor]:
    """The tensors of `model()` after a change of the size that an optimizer's steps make."""
    from tests.vllm.shared import model

    generator = torch.Generator().manual_seed(3)
    return {
        name: tensor + step * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in policy_tensors(model()).items()
    }


def by_version(request: SampleRequest, sample: Sample, weights: dict[int, dict[str, Tensor]]) -> list[float]:
    """Each token's log-probability by one plain forward pass in float32 of the version that it names."""
    from tests.vllm.shared import model

    found: dict[int, Tensor] = {}
    for version in set(sample.versions):
        of_version = model()
        of_version.load_state_dict(weights[version], strict=False)
        found[version] = full_logps(of_version, request.prompt_token_ids, sample.token_ids)
    return [
        float(found[v][t, token]) for t, (v, token) in enumerate(zip(sample.versions, sample.token_ids, strict=True))
    ]


def differences(request: SampleRequest, sample: Sample, weights: dict[int, dict[str, Tensor]]) -> Tensor:
    return (torch.tensor(sample.logps) - torch.tensor(by_version(request, sample, weights))).abs()


async def updated_midway(
    engine: "OnLoop", requests: list[SampleRequest], weights: dict[str, Tensor], *, version: int = 1
) -> tuple[list[list[Sample]], int]:
    """Samples `requests` and loads `weights` once some tokens of all of them are there."""
    sampling = [asyncio.create_task(engine.sample(r)) for r in requests]
    responses = sum(r.responses for r in requests)
    while len(engine.engine._begun()) < responses:  # none ends before 60 tokens
        await asyncio.sleep(0.001)
    report = await engine.load(version, weights)
    return list(await asyncio.gather(*sampling)), report.sequences_in_flight


def long_requests(count: int = 8) -> list[SampleRequest]:
    return [request(f"r{i}", (5 + i, 6, 7), 2, max_new_tokens=60, stream=i) for i in range(count)]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logps_are_those_of_the_learner_at_one_version(shared: "SharedVllm", temperature: float) -> None:
    from tests.vllm.shared import model

    r = request(responses=8, max_new_tokens=40, temperature=temperature)
    for sample in run(shared.engine().sample(r)):
        rows = (full_logps(model(), r.prompt_token_ids, sample.token_ids) / temperature).log_softmax(-1)
        expected = rows.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        assert torch.tensor(sample.logps, dtype=torch.float64) == pytest.approx(expected, abs=1e-4)


def test_logps_are_renormalized_over_the_tokens_that_top_k_and_top_p_leave(shared: "SharedVllm") -> None:
    from tests.vllm.shared import model

    engine = shared.engine()
    for params in (SamplingParams(12, top_k=4), SamplingParams(12, top_p=0.5)):
        r = SampleRequest("r", (5, 6, 7), 8, params, (0, 1, 2, 3))
        for sample in run(engine.sample(r)):
            rows = full_logps(model(), r.prompt_token_ids, sample.token_ids)
            for logps, token, logp in zip(rows, sample.token_ids, sample.logps, strict=True):
                ordered, order = logps.sort(descending=True)
                before = ordered.exp().cumsum(0) - ordered.exp()
                kept = order[: params.top_k] if params.top_k else order[before < params.top_p]
                assert token in kept
                assert logp == pytest.approx(float(logps[token] - logps[kept].logsumexp(0)), abs=1e-4)


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_an_update_during_decoding_loses_nothing_and_names_the_version_of_every_token(
    shared: "SharedVllm", mode: UpdateMode
) -> None:
    from tests.vllm.shared import model

    weights = {0: policy_tensors(model()), 1: new_weights()}
    requests = long_requests()
    found, in_flight = run(updated_midway(shared.engine(mode, eos_token_ids=()), requests, weights[1]))
    assert in_flight == 16
    kept_distance = []
    for r, samples in zip(requests, found, strict=True):
        assert len(samples) == r.responses
        for sample in samples:
            assert sample.versions == sorted(sample.versions)
            assert (len(sample.token_ids), sample.finish_reason) == (60, "length")
            assert set(sample.versions) == {0, 1}
            difference = differences(r, sample, weights)
            first = torch.tensor(sample.versions) == sample.versions[0]
            assert difference[first].max() < 1e-3
            if mode == "recompute":
                assert difference.max() < 1e-3
            else:
                kept_distance += difference[~first].tolist()
    if mode == "keep":
        # Keys and values of the old weights are seen: these tokens are of no single version.
        assert np.mean(kept_distance) > 1e-3


def test_a_token_after_an_update_that_kept_the_cache_has_the_logp_it_was_sampled_with(shared: "SharedVllm") -> None:
    from transformers import DynamicCache

    from tests.vllm.shared import model

    old, new = model(), model()
    new.load_state_dict(new_weights(), strict=False)
    requests = long_requests(2)
    found, _ = run(updated_midway(shared.engine("keep", eos_token_ids=()), requests, new_weights()))
    for r, samples in zip(requests, found, strict=True):
        for sample in samples:
            cache, inputs = DynamicCache(), list(r.prompt_token_ids)
            with torch.inference_mode():
                for token, logp, version in zip(sample.token_ids, sample.logps, sample.versions, strict=True):
                    of_version = new if version else old
                    logits = of_version(torch.tensor([inputs]), past_key_values=cache, use_cache=True).logits[0, -1]
                    assert logp == pytest.approx(float(logits.double().log_softmax(-1)[token]), abs=1e-4)
                    inputs = [token]


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_a_cached_prompt_is_not_found_again_under_new_weights(shared: "SharedVllm", mode: UpdateMode) -> None:
    from tests.vllm.shared import BLOCK

    weights = {1: new_weights(1.0)}
    prompt = [2 + i % 20 for i in range(BLOCK + 8)]

    async def scenario() -> tuple[SampleRequest, list[Sample]]:
        engine = shared.engine(mode)
        r = request("r", prompt, 4, max_new_tokens=8)
        await engine.sample(r)
        await engine.load(1, weights[1])
        return r, await engine.sample(r)

    r, samples = run(scenario())
    for sample in samples:
        assert sample.versions == [1] * len(sample.token_ids)
        assert differences(r, sample, weights).max() < 1e-3


def test_responses_that_wait_for_a_place_begin_under_the_new_weights(shared: "SharedVllm") -> None:
    from tests.vllm.shared import BLOCK, model

    weights = {0: policy_tensors(model()), 1: new_weights(1.0)}
    r = request("r", [2 + i % 20 for i in range(BLOCK + 2)], 24, max_new_tokens=28)

    async def scenario() -> list[Sample]:
        engine = shared.engine("keep", slots=4, eos_token_ids=())
        sampling = asyncio.create_task(engine.sample(r))
        while len(engine.engine._begun()) < 4:
            await asyncio.sleep(0.001)
        await engine.load(1, weights[1])
        return await sampling

    samples = run(scenario())
    assert {sample.versions[0] for sample in samples} == {0, 1}
    for sample in samples:
        first = torch.tensor(sample.versions) == sample.versions[0]
        assert differences(r, sample, weights)[first].max() < 1e-3


def publication(version: int, damage: Callable[[bytearray], None] = lambda data: None, **changes: Tensor | None):
    """What a policy store would answer: all tensors, with some replaced or (None) left out, then bytes damaged."""
    tensors = {**new_weights(), **{k: v for k, v in changes.items() if v is not None}}
    tensors = {name: tensor for name, tensor in tensors.items() if changes.get(name, tensor) is not None}
    manifest = describe(tensors, version=version, step=version)
    layout = lay_out(manifest.tensors)
    chunks = []
    for chunk in cut(tensors, layout):
        data = bytearray(chunk.tobytes())
        damage(data)
        chunks.append(np.frombuffer(bytes(data), np.uint8))
    return manifest, layout, chunks


def flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        (flip, {}, "must have sha256"),
        (
            lambda data: None,
            {"model.norm.weight": None},
            "tensor 'model.norm.weight' must be given with shape [32], but is missing",
        ),
        (
            lambda data: None,
            {"model.norm.weight": torch.zeros(16)},
            "tensor 'model.norm.weight' must have shape [32], got [16]",
        ),
    ],
    ids=["a flipped byte", "a missing tensor", "a wrong shape"],
)
def test_damaged_weights_are_refused_by_name_while_sampling_goes_on_from_the_old_ones(
    shared: "SharedVllm", damage: Callable[[bytearray], None], changes: dict[str, Tensor | None], message: str
) -> None:
    from tests.vllm.shared import model

    weights = {0: policy_tensors(model())}
    r = request(responses=4, max_new_tokens=60)

    async def scenario() -> list[Sample]:
        engine = shared.engine()

        async def fetch(weights: str, version: int, have: object) -> object:
            return publication(version, damage, **changes)

        actor = Generation("generation-0", {POLICY_WEIGHTS: engine}, None, r.params, fetch)  # type: ignore[arg-type]
        sampling = asyncio.create_task(engine.sample(r))
        with pytest.raises(PolicyError) as caught:
            await actor.pull(1)
        text = str(caught.value)
        assert text.startswith("generation-0 keeps policy version 0: ")
        assert message in text
        assert "tensor" in text
        assert engine.version == 0
        return [*await sampling, *await engine.sample(r)]

    for sample in run(scenario()):
        assert sample.versions == [0] * len(sample.token_ids)
        assert differences(r, sample, weights).max() < 1e-3


def test_weights_that_vllm_cannot_map_are_refused_and_the_next_ones_are_taken(
    shared: "SharedVllm", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file in shared memory is cut short between its writing and its mapping."""
    import contextlib
    import os

    from actors.engines import vllm
    from tests.vllm.shared import model

    written = vllm.shared_weights

    @contextlib.contextmanager
    def cut_short(version: int, tensors: dict[str, Tensor]):
        with written(version, tensors) as (path, placed):
            os.truncate(path, placed[-1].offset)
            yield path, placed

    weights = {0: policy_tensors(model()), 2: new_weights()}
    r = request(responses=2, max_new_tokens=20)

    async def scenario() -> None:
        engine = shared.engine()
        with monkeypatch.context() as patch:
            patch.setattr(vllm, "shared_weights", cut_short)
            with pytest.raises(PolicyError) as caught:
                await engine.load(1, new_weights())
        assert str(caught.value).startswith("policy version 1: vLLM must be able to take the weights, got ")
        assert "'model.norm.weight'" in str(caught.value)
        assert str(caught.value).endswith("; version 0 stays")
        for sample in await engine.sample(r):
            assert differences(r, sample, weights).max() < 1e-3
        await engine.load(2, weights[2])
        for sample in await engine.sample(r):
            assert sample.versions == [2] * len(sample.token_ids)
            assert differences(r, sample, weights).max() < 1e-3

    run(scenario())


def test_cancelling_a_call_takes_its_responses_out_of_vllm(shared: "SharedVllm") -> None:
    async def scenario() -> None:
        engine = shared.engine(slots=4, eos_token_ids=())
        call = asyncio.create_task(engine.sample(request(responses=8, max_new_tokens=60)))
        while not engine.engine._begun():
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert len(await engine.sample(request("next", responses=8, max_new_tokens=4))) == 8
        assert not shared.llm.output_processor.request_states

    run(scenario())
