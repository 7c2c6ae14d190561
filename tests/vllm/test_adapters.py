"""Adapters that are published alone, added to the frozen weights and loaded into vLLM."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from actors.adapters import Adapters
from distrl.lora import LoraSettings, adapter_layers, add_adapters
from distrl.weights import policy_tensors
from tests.engines.tiny import full_logps, request

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs these tests")
pytest.importorskip("peft", reason="peft is not installed; make test-vllm runs these tests")

if TYPE_CHECKING:
    from tests.vllm.shared import SharedVllm

RANK, ALPHA, TARGETS = 2, 4.0, ("q_proj", "v_proj", "down_proj")


def with_adapters() -> Any:
    from tests.vllm.shared import model

    found: Any = model()
    add_adapters(found, LoraSettings(RANK, ALPHA, TARGETS), seed=0)
    return found


def test_pulled_adapters_give_the_logps_of_peft_and_the_frozen_weights_never_move(shared: "SharedVllm") -> None:
    from tests.actors.test_adapters import actor_of, peft_merged
    from tests.actors.test_pull import Wire
    from tests.vllm.shared import model

    learner = with_adapters()
    base = model()
    wire, engine = Wire(), shared.engine()
    assert not engine.loads_changes  # so that vLLM gets all tensors, of which the actor has the frozen ones
    adapters = Adapters(policy_tensors(base), adapter_layers(with_adapters()), loads_changes=False)
    actor = actor_of(wire, engine, adapters)
    numbers = sum(
        RANK * sum(x.shape)
        for name, x in base.state_dict().items()
        if name.split(".")[-2] in TARGETS and name.endswith(".weight")
    )
    generator = torch.Generator().manual_seed(1)

    async def scenario() -> None:
        for version in (1, 2, 3):
            published = {}
            with torch.no_grad():
                for name, tensor in policy_tensors(learner).items():
                    if ".lora_" in name:
                        tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
                        published[name.replace(".default.", ".")] = tensor
            await wire.publish(version, published)
            assert (await actor.pull(version)).moved_bytes == 4 * numbers
            merged = model()
            merged.load_state_dict(peft_merged(learner))
            r = request(f"v{version}", responses=4, max_new_tokens=24, stream=version)
            for sample in await engine.sample(r):
                assert set(sample.versions) == {version}
                rows = full_logps(merged, r.prompt_token_ids, sample.token_ids)
                expected = rows.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
                assert torch.tensor(sample.logps, dtype=torch.float64) == pytest.approx(expected, abs=1e-3)
                plain = full_logps(base, r.prompt_token_ids, sample.token_ids)
                assert (plain - rows).abs().max() > 0.1  # the adapters change what is compared

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_the_config_builds_adapters_for_vllm_with_the_whole_model(tmp_path: Path) -> None:
    from actors.engines.build import build_adapters
    from distrl.config import make_config
    from tests.vllm.shared import model

    model().save_pretrained(tmp_path)
    config = make_config(
        {
            "model": {"path": tmp_path},
            "data": {"source": "sort_digits"},
            "generation": {"engine": "vllm"},
            "lora": {"rank": RANK, "alpha": ALPHA, "targets": TARGETS, "publish": "adapter"},
        }
    )

    class Whole:
        loads_changes = False

    adapters = build_adapters(config, Whole())  # type: ignore[arg-type]
    assert adapters is not None
    published = {
        name: torch.ones(shape)
        for path, layer in adapter_layers(with_adapters()).items()
        for name, shape in ((f"{path}.lora_A.weight", layer.a_shape), (f"{path}.lora_B.weight", layer.b_shape))
    }
    weights = adapters.merged(1, published, changed_only=False)
    frozen = policy_tensors(model())
    assert weights.keys() == frozen.keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    # Two ranks of ones, times alpha / rank.
    assert torch.equal(weights[name], frozen[name] + 2.0 * ALPHA / RANK)
