"""Adapters are published alone: only their bytes move, and an engine that adds them has what peft merges."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.adapters import Adapters
from actors.engines.fake import FakeEngine
from actors.engines.transformers import TransformersEngine
from actors.generation import Generation
from distrl.errors import DamagedWeightsError, PolicyError
from distrl.lora import LoraSettings, Publish, adapter_layers, add_adapters
from distrl.messages import Chunk, Layout, Manifest
from distrl.sampling import SampleRequest, SamplingParams
from distrl.weights import policy_tensors
from learners.trainer import Trainer
from tests.actors.test_pull import Wire
from tests.builders import run
from tests.learners.test_families import make, trainer_of
from tests.learners.workers import tickets
from tests.system.in_process import PARAMS, Digits

TARGETS = {"qwen3": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_proj")}
RANK = 2


def learner(family: str, directory: Path, publish: Publish = "adapter") -> tuple[Trainer, Any]:
    model = make(family)
    add_adapters(model, LoraSettings(RANK, 4.0, TARGETS[family]), seed=3)
    return trainer_of(model, directory, publish=publish), model


def adapters_of(family: str, *, loads_changes: bool = True) -> Adapters:
    model = make(family)
    base = policy_tensors(model)
    add_adapters(model, LoraSettings(RANK, 4.0, TARGETS[family]), seed=0)
    return Adapters(base, adapter_layers(model), loads_changes=loads_changes)


def engine_of(family: str) -> TransformersEngine:
    return TransformersEngine(make(family), eos_token_ids=(1,), pad_token_id=0, slots=32, threads=1)


def actor_of(wire: Wire, engine: Any, adapters: Adapters) -> Generation:
    return Generation("generation-3", {"policy": engine}, Digits(), PARAMS, wire.fetch, adapters={"policy": adapters})


def peft_merged(model: Any) -> dict[str, Tensor]:
    """What peft itself makes of a model with adapters; leaves the model as it was."""
    import copy

    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, LoraLayer):
            assert isinstance(module, BaseTunerLayer)
            module.merge()
    state = {name.replace(".base_layer.", "."): x for name, x in twin.state_dict().items() if ".lora_" not in name}
    return {name: x.clone() for name, x in state.items()}


@pytest.mark.parametrize("family", TARGETS)
def test_only_the_adapters_bytes_move_and_log_probabilities_are_those_of_merged_weights(
    family: str, tmp_path: Path
) -> None:
    trainer, model = learner(family, tmp_path)
    # Counted on a model without adapters, where a targeted layer has inputs x outputs weights: A has rank x inputs,
    # B outputs x rank.
    numbers = sum(
        RANK * sum(x.shape)
        for name, x in make(family).state_dict().items()
        if name.endswith(".weight") and name.split(".")[-2] in TARGETS[family]
    )

    async def scenario() -> None:
        wire, engine = Wire(), engine_of(family)
        actor = actor_of(wire, engine, adapters_of(family))
        for step in (1, 2, 3):
            trainer.step(trainer.training_batch(tickets(step)), step)
            await wire.publish(step, trainer.policy_tensors())
            receipt = await actor.pull(step)
            assert receipt.moved_bytes == 4 * numbers
            params = SamplingParams(max_new_tokens=12)
            (sample,) = await engine.sample(SampleRequest("a", (5, 6, 7), 1, params, (1, step)))
            merged = make(family)
            merged.load_state_dict(peft_merged(model))
            ids = torch.tensor([[5, 6, 7, *sample.token_ids]])
            with torch.no_grad():
                table = torch.log_softmax(merged.eval()(input_ids=ids, use_cache=False).logits[0].double(), 1)
            expected = [float(table[2 + i, token]) for i, token in enumerate(sample.token_ids)]
            assert sample.logps == pytest.approx(expected, abs=1e-5)
        await engine.close()

    run(scenario())


@pytest.mark.parametrize("loads_changes", [True, False])
def test_after_many_versions_weights_are_those_of_the_newest_alone(loads_changes: bool) -> None:
    adapters = adapters_of("qwen3", loads_changes=loads_changes)
    base = policy_tensors(make("qwen3"))
    path = "model.layers.1.self_attn.q_proj"
    layers = [name.removesuffix(".weight") for name in base if name.split(".")[-2] in TARGETS["qwen3"]]
    held = {name: x.clone() for name, x in base.items()}
    generator = torch.Generator().manual_seed(7)
    for version in range(1, 51):
        given = {}
        for layer in layers if version == 1 else [path]:
            outputs, inputs = base[f"{layer}.weight"].shape
            given[f"{layer}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator)
            given[f"{layer}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator)
        weights = adapters.merged(version, given, changed_only=version > 1)
        adapters.loaded(given)
        if version > 1:
            assert weights.keys() == ({f"{path}.weight"} if loads_changes else base.keys())
        held.update(weights)
        if version == 1:
            first = given
    for layer in layers:
        last = given if layer == path else first
        a, b = last[f"{layer}.lora_A.weight"].double(), last[f"{layer}.lora_B.weight"].double()
        expected = base[f"{layer}.weight"].double() + 4.0 / RANK * (b @ a)
        # Of one addition in float32, not of fifty.
        torch.testing.assert_close(held[f"{layer}.weight"].double(), expected, rtol=3e-7, atol=3e-6)
    untouched = held.keys() - {f"{layer}.weight" for layer in layers}
    assert all(torch.equal(held[name], base[name]) for name in untouched)


def test_adapters_without_a_change_are_the_frozen_weights_to_the_bit() -> None:
    adapters, base = adapters_of("gpt2", loads_changes=False), policy_tensors(make("gpt2"))
    zeros = {name: torch.zeros(x.shape) for name, x in adapters._expected.items()}
    found = adapters.merged(1, zeros, changed_only=False)
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], base[name]) for name in base)


def test_a_damaged_adapter_is_refused_by_name_and_the_actor_samples_from_what_it_had(tmp_path: Path) -> None:
    trainer, _ = learner("qwen3", tmp_path)
    damaged = "model.layers.0.self_attn.q_proj.lora_B.weight"

    def flip(manifest: Manifest, layout: Layout, chunks: list[Chunk]) -> Any:
        span = layout[damaged][0]
        chunks[span.chunk][span.offset] ^= 1
        return manifest, layout, chunks

    def sampled(engine: TransformersEngine) -> Any:
        return engine.sample(SampleRequest("a", (5, 6, 7), 2, SamplingParams(max_new_tokens=8), (1, 2)))

    async def scenario() -> None:
        wire, engine = Wire(), engine_of("qwen3")
        actor = actor_of(wire, engine, adapters_of("qwen3"))
        for step in (1, 2):
            trainer.step(trainer.training_batch(tickets(step)), step)
            tensors = trainer.policy_tensors()
            await wire.publish(step, tensors)
            if step == 1:
                await actor.pull(1)
        before = await sampled(engine)
        wire.damage = flip
        with pytest.raises(DamagedWeightsError) as caught:
            await actor.pull(2)
        good = tensors[damaged].numpy().tobytes()
        bad = bytes([good[0] ^ 1]) + good[1:]
        assert str(caught.value) == (
            f"generation-3 keeps policy version 1: policy version 2: tensor {damaged} must have sha256 "
            f"{hashlib.sha256(good).hexdigest()}, got {hashlib.sha256(bad).hexdigest()}; the bytes were damaged on the "
            "way, publish the version again"
        )
        assert engine.version == 1
        assert await sampled(engine) == before
        wire.damage = lambda *whole: whole
        assert (await actor.pull(2)).version == 2
        await engine.close()

    run(scenario())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name: {name: None},
            "tensor {name!r} must be given with shape [32, 2], but is missing; {remedy}",
        ),
        (
            lambda name: {name: torch.zeros(32, 3)},
            "tensor {name!r} must have shape [32, 2], got [32, 3]; {remedy}",
        ),
        (
            lambda name: {"lm_head.weight": torch.zeros(2, 2)},
            "tensor 'lm_head.weight' must be one of the model's 8 tensors, got an unknown name with shape [2, 2]; "
            "{remedy}",
        ),
    ],
)
def test_other_adapters_are_refused_and_nothing_reaches_the_engine(change: Any, message: str) -> None:
    async def scenario() -> None:
        wire, engine, adapters = Wire(), FakeEngine(), adapters_of("qwen3")
        actor = actor_of(wire, engine, adapters)
        name = "model.layers.0.self_attn.q_proj.lora_B.weight"
        good = {name: torch.ones(x.shape) for name, x in adapters._expected.items()}
        given: Mapping[str, Tensor | None] = {**good, **change(name)}
        await wire.publish(1, {name: x for name, x in given.items() if x is not None})
        with pytest.raises(PolicyError) as caught:
            await actor.pull(1)
        remedy = "publish the adapters of the same model with the same lora.rank and lora.targets"
        assert str(caught.value) == "generation-3 keeps policy version 0: policy version 1: " + message.format(
            name=name, remedy=remedy
        )
        assert engine.loads == []

    run(scenario())


def test_checkpoints_are_merged_and_resume_whatever_is_published(tmp_path: Path) -> None:
    from distrl.models import load_model
    from learners.checkpoint import TrainState

    whole, _ = learner("qwen3", tmp_path / "merged", "merged")
    alone, model = learner("qwen3", tmp_path / "adapter", "adapter")
    for step in (1, 2):
        for trainer in (whole, alone):
            trainer.step(trainer.training_batch(tickets(step)), step)
    directories = []
    for trainer in (whole, alone):
        trainer.begin_checkpoint(TrainState(2, 2))
        written = trainer.finished_checkpoint(wait=True)
        assert written is not None
        directories.append(Path(written.location))
    first, second = (load_model(directory, torch.float32).state_dict() for directory in directories)
    expected = peft_merged(model)
    assert first.keys() == second.keys()
    for name, tensor in second.items():
        assert torch.equal(tensor, first[name])
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)

    again, _ = learner("qwen3", tmp_path / "again", "adapter")
    again.restore(directories[1])
    found, wanted = again.policy_tensors(), alone.policy_tensors()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
