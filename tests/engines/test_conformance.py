"""What every engine does, the fake one included: otherwise a test with the fake would prove nothing."""

import asyncio
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from actors.engines.fake import FakeEngine
from distrl.errors import PolicyError, StageError
from distrl.sampling import Engine, Sample, SampleRequest, SamplingParams
from distrl.weights import policy_tensors
from tests.builders import run
from tests.engines.tiny import CONTEXT, EOS, VOCABULARY, request, tiny_engine, tiny_model


def fake() -> Engine:
    return FakeEngine(
        vocabulary_size=VOCABULARY,
        context_length=CONTEXT,
        eos_token_id=EOS,
        policy=policy_tensors(tiny_model()),
    )


@pytest.fixture(params=[fake, tiny_engine], ids=["fake", "transformers"])
def make(request: pytest.FixtureRequest) -> Callable[[], Engine]:
    made: Callable[[], Engine] = request.param
    return made


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Other weights for the engine's model."""
    return policy_tensors(tiny_model(seed=9))


@pytest.fixture
def tolerance() -> float:
    """Largest difference (nats) between log-probabilities of one request that met other neighbors."""
    return 0.0


def assert_same(found: list[Sample], expected: list[Sample], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert dataclasses.replace(one, logps=[]) == dataclasses.replace(other, logps=[])
        assert one.logps == pytest.approx(other.logps, rel=0, abs=tolerance)


def test_an_engine_tells_its_sizes_and_begins_at_version_0(make: Callable[[], Engine]) -> None:
    async def scenario() -> tuple[int, int, int]:
        engine = make()
        await engine.close()
        return engine.vocabulary_size, engine.context_length, engine.version

    assert run(scenario()) == (VOCABULARY, CONTEXT, 0)


def test_every_sample_keeps_the_interfaces_promises(make: Callable[[], Engine]) -> None:
    async def scenario() -> None:
        engine = make()
        for r in (request(responses=40, max_new_tokens=30), request(responses=1, max_new_tokens=1, stream=3)):
            samples = await engine.sample(r)
            assert len(samples) == r.responses
            for s in samples:
                n = len(s.token_ids)
                assert 1 <= n <= r.params.max_new_tokens
                assert len(s.logps) == len(s.versions) == n
                assert all(0 <= token < VOCABULARY for token in s.token_ids)
                assert all(math.isfinite(logp) and logp <= 0 for logp in s.logps)
                assert s.versions == [0] * n
                assert EOS not in s.token_ids[:-1]
                ended = s.token_ids[-1] == EOS
                assert s.finish_reason == ("stop" if ended else "length")
                assert ended or n == r.params.max_new_tokens
        await engine.close()

    run(scenario())


def test_the_stream_and_the_weights_alone_decide_the_responses(
    make: Callable[[], Engine], tensors: dict[str, torch.Tensor], tolerance: float
) -> None:
    async def scenario() -> None:
        engine, other = make(), make()
        r = request(responses=6, max_new_tokens=12)
        alone = await engine.sample(r)
        crowd = [request(f"r{i}", stream=i + 1) for i in range(5)]
        beside, *_ = await asyncio.gather(*(other.sample(one) for one in (r, *crowd)))
        assert_same(beside, alone, tolerance)
        assert_same(await other.sample(dataclasses.replace(r, request_id="another name")), alone, tolerance)
        assert await other.sample(request(responses=6, max_new_tokens=12, stream=99)) != alone
        await engine.load(1, tensors)
        assert [s.token_ids for s in await engine.sample(r)] != [s.token_ids for s in alone]
        await engine.close()
        await other.close()

    run(scenario())


def test_a_request_with_fewer_responses_gets_the_first_of_the_same(
    make: Callable[[], Engine], tolerance: float
) -> None:
    async def scenario() -> None:
        engine = make()
        many = await engine.sample(request(responses=5))
        assert_same(await engine.sample(request(responses=2)), many[:2], tolerance)
        await engine.close()

    run(scenario())


def test_loaded_weights_give_their_version_to_every_later_token(
    make: Callable[[], Engine], tensors: dict[str, torch.Tensor]
) -> None:
    async def scenario() -> None:
        engine = make()
        report = await engine.load(4, tensors)
        assert (report.version, report.sequences_in_flight, engine.version) == (4, 0, 4)
        assert report.pause_s >= 0
        for s in await engine.sample(request()):
            assert s.versions == [4] * len(s.token_ids)
        await engine.close()

    run(scenario())


def test_versions_never_decrease_while_weights_arrive(
    make: Callable[[], Engine], tensors: dict[str, torch.Tensor]
) -> None:
    async def scenario() -> None:
        engine = make()
        sampling = [
            asyncio.create_task(engine.sample(request(f"r{i}", responses=9, max_new_tokens=40, stream=i)))
            for i in range(6)
        ]
        for version in range(1, 8):
            assert (await engine.load(version, tensors)).version == version
        for samples in await asyncio.gather(*sampling):
            for s in samples:
                assert s.versions == sorted(s.versions)
                assert set(s.versions) <= set(range(8))
        await engine.close()

    run(scenario())


def with_bad(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = dict(tensors)
    if name == "missing":
        del tensors["model.norm.weight"]
    elif name == "unknown":
        tensors["model.extra"] = torch.zeros(2)
    else:
        tensors["model.norm.weight"] = torch.zeros(16)
    return tensors


REMEDY = "publish distrl.weights.policy_tensors of the same model"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("missing", "tensor 'model.norm.weight' must be given with shape [32], but is missing"),
        ("misshapen", "tensor 'model.norm.weight' must have shape [32], got [16]"),
        ("unknown", "tensor 'model.extra' must be one of the model's 24 tensors, got an unknown name with shape [2]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(
    make: Callable[[], Engine], tensors: dict[str, torch.Tensor], tolerance: float, bad: str, message: str
) -> None:
    async def scenario() -> None:
        engine = make()
        before = await engine.sample(request())
        with pytest.raises(PolicyError) as caught:
            await engine.load(1, with_bad(bad, tensors))
        assert str(caught.value) == f"policy version 1: {message}; {REMEDY}"
        assert engine.version == 0
        assert_same(await engine.sample(request()), before, tolerance)
        await engine.close()

    run(scenario())


def test_older_weights_are_refused_and_the_newer_ones_stay(
    make: Callable[[], Engine], tensors: dict[str, torch.Tensor]
) -> None:
    async def scenario() -> None:
        engine = make()
        await engine.load(5, tensors)
        await engine.load(5, tensors)
        with pytest.raises(PolicyError) as caught:
            await engine.load(4, tensors)
        assert str(caught.value) == (
            "policy version 4: must be >= the loaded version 5; publish older weights under a new version"
        )
        assert engine.version == 5
        await engine.close()

    run(scenario())


SHORT = SamplingParams(max_new_tokens=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_token_ids": ()}, "prompt must have >= 1 token, got 0; begin it with the beginning-of-sequence token"),
        (
            {"prompt_token_ids": (3,) * 61},
            "prompt + max_new_tokens must be <= 64 tokens (the model's context), got 61 + 4 = 65; "
            "drop the prompt or lower max_new_tokens",
        ),
        (
            {"prompt_token_ids": (3, 23)},
            "prompt tokens must be in 0..22, got 23; use the tokenizer that belongs to the model",
        ),
        (
            {"prompt_token_ids": (3, -1)},
            "prompt tokens must be in 0..22, got -1; use the tokenizer that belongs to the model",
        ),
        ({"responses": 0}, "responses must be >= 1, got 0; ask for one response"),
        (
            {"params": SamplingParams(max_new_tokens=0)},
            "max_new_tokens must be >= 1, got 0; ask for one token",
        ),
        (
            {"params": SamplingParams(4, temperature=0.0)},
            "temperature must be > 0, got 0.0; use a small one such as 0.001 for nearly greedy decoding",
        ),
        ({"params": SamplingParams(4, top_p=0.0)}, "top_p must be in (0, 1], got 0.0; use 1 to keep all tokens"),
        ({"params": SamplingParams(4, top_p=1.5)}, "top_p must be in (0, 1], got 1.5; use 1 to keep all tokens"),
        ({"params": SamplingParams(4, top_k=-1)}, "top_k must be >= 0, got -1; use 0 to keep all tokens"),
    ],
)
def test_a_request_that_breaks_a_rule_fails_alone(
    make: Callable[[], Engine], changes: dict[str, object], message: str
) -> None:
    async def scenario() -> None:
        engine = make()
        good = SampleRequest("t7.0", (3, 4), 2, SHORT, (0, 1, 2, 3))
        bad, fine = await asyncio.gather(
            engine.sample(dataclasses.replace(good, **changes)), engine.sample(good), return_exceptions=True
        )
        assert type(bad) is StageError
        assert str(bad) == f"generation request 't7.0': {message}"
        assert isinstance(fine, list)
        await engine.close()

    run(scenario())


def test_a_closed_engine_refuses_everything_and_may_be_closed_again(
    make: Callable[[], Engine], tensors: dict[str, torch.Tensor]
) -> None:
    async def scenario() -> None:
        engine = make()
        await engine.close()
        await engine.close()
        for call in (lambda: engine.sample(request()), lambda: engine.load(1, tensors)):
            with pytest.raises(StageError) as caught:
                await call()
            assert str(caught.value) == "generation engine: closed; start another one"

    run(scenario())
