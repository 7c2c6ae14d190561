"""One worker, several, copies or shards, resumed by more or fewer: the same tickets give the same weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from learners.world import World
from tests.learners.workers import STEPS, Case, FixedLink, run, spawn

CASES = {
    "ddp": Case(),
    "fsdp": Case(parallel="fsdp"),
    "fsdp, packed, blocks computed again": Case(parallel="fsdp", layout="packed", activation_checkpointing=True),
    "ddp, more micro-batches": Case(micro_batch_tokens=17),
    "ddp, float32": Case(dtype=torch.float32),
    "fsdp, float32": Case(parallel="fsdp", dtype=torch.float32),
    "fsdp, packed, float32": Case(parallel="fsdp", layout="packed", dtype=torch.float32),
    "ddp, bfloat16": Case(dtype=torch.float32, products=torch.bfloat16),
    "fsdp, bfloat16": Case(parallel="fsdp", dtype=torch.float32, products=torch.bfloat16),
}
FOLLOWING = Case(recipe="rpg", options={"anchor": "reference", "reference_every": 3, "kl_coefficient": 0.5})
"""Its reference is the start for three steps, then the policy of the third."""
HALF = STEPS // 2


def outcome(link: FixedLink) -> dict[str, Any]:
    return {
        "metrics": [dict(report.metrics) for report in link.reports],
        "weights": link.weights,
        "checkpoints": [str(path) for path in link.checkpoints],
    }


def in_two_workers(world: World, folder: Path) -> None:
    """Everything that needs two processes, one after the other in the same two: starting them takes seconds."""
    found: dict[str, Any] = {}

    def keep(name: str, link: FixedLink) -> None:
        if world.first:
            found[name] = outcome(link)

    (half,) = (folder / "one").glob(f"step-{HALF:06d}-v*")
    for name, case in CASES.items():
        keep(name, run(case, folder / name, world))
    for parallel in ("ddp", "fsdp"):
        case = Case(parallel=parallel)
        keep(f"1 to 2 {parallel}", run(case, folder / "later", world, half))
        keep(f"half {parallel}", run(replace(case, steps=HALF), folder / parallel, world))
        following = replace(FOLLOWING, parallel=parallel)
        keep(f"following {parallel}", run(following, folder / "following", world))
        keep(f"half following {parallel}", run(replace(following, steps=HALF), folder / f"following {parallel}", world))
        once = Case(recipe="topr", parallel=parallel, max_grad_norm=1e9, micro_batch_tokens=10_000)
        keep(f"once {parallel}", run(once, folder / "once", world))
    if world.first:
        torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("workers")
    run(Case(steps=HALF), made / "one")
    spawn(in_two_workers, 2, made)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / "found.pt", weights_only=False)
    return loaded


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return outcome(run(Case(), folder / "alone"))


def assert_same(found: dict[str, Any], expected: dict[str, Any], atol: float, steps: slice = slice(None)) -> None:
    assert len(found["metrics"]) == len(expected["metrics"][steps]) > 0
    for a, b in zip(found["metrics"], expected["metrics"][steps], strict=True):
        assert a == pytest.approx(b, abs=atol, rel=atol)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name].double(), value.double(), rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("name", [name for name in CASES if "float" not in name])
def test_two_workers_train_like_one_however_they_share_the_model_and_its_sequences(
    name: str, found: dict[str, Any], alone: dict[str, Any]
) -> None:
    assert_same(found[name], alone, 1e-10)
    losses = [m["loss"] for m in alone["metrics"]]
    assert len(set(losses)) == STEPS  # the weights move


@pytest.mark.parametrize("name", [name for name in CASES if "float32" in name])
def test_in_float32_they_agree_within_its_noise(name: str, found: dict[str, Any], alone: dict[str, Any]) -> None:
    for a, b in zip(found[name]["metrics"], alone["metrics"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5, rel=0)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_products_in_bfloat16_are_summed_into_float32_weights(
    parallel: str, found: dict[str, Any], alone: dict[str, Any]
) -> None:
    rounded = found[f"{parallel}, bfloat16"]
    for a, b in zip(rounded["metrics"], alone["metrics"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2**-8)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2**-6)
    losses = [m["loss"] for m in rounded["metrics"]], [m["loss"] for m in alone["metrics"]]
    assert losses[0] != pytest.approx(losses[1], abs=1e-3, rel=0)  # else nothing was rounded
    for name, weight in rounded["weights"].items():
        assert weight.dtype == torch.float32
        # A weight that had been kept in the lower precision at any time would be one of its numbers.
        assert (weight.bfloat16().float() != weight).float().mean() > 0.9, name


@pytest.mark.parametrize(
    "change", [{"layout": "packed"}, {"micro_batch_tokens": 16}, {"activation_checkpointing": True}]
)
def test_layout_and_micro_batches_change_nothing(change: dict[str, Any], alone: dict[str, Any], tmp_path: Path) -> None:
    assert_same(outcome(run(replace(Case(), **change), tmp_path)), alone, 1e-10)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_one_worker_is_resumed_by_two(parallel: str, found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert_same(found[f"1 to 2 {parallel}"], alone, 1e-10, slice(HALF, None))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_two_workers_is_resumed_by_one(
    parallel: str, found: dict[str, Any], alone: dict[str, Any], folder: Path
) -> None:
    (checkpoint,) = found[f"half {parallel}"]["checkpoints"]
    assert_same(outcome(run(Case(), folder / "again", resume=Path(checkpoint))), alone, 1e-10, slice(HALF, None))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_reference_that_follows_the_policy_is_the_same_in_shards_and_resumed_by_fewer_workers(
    parallel: str, found: dict[str, Any], folder: Path
) -> None:
    alone = outcome(run(FOLLOWING, folder / "following alone"))
    assert_same(found[f"following {parallel}"], alone, 1e-10)
    (checkpoint,) = found[f"half following {parallel}"]["checkpoints"]
    resumed = run(FOLLOWING, folder / "following again", resume=Path(checkpoint))
    assert_same(outcome(resumed), alone, 1e-10, slice(HALF, None))


def test_copies_and_shards_add_up_gradients_in_the_same_order_and_agree_bit_by_bit(found: dict[str, Any]) -> None:
    """Two summands commute, and nothing is clipped: the norm is added up in another order."""
    copies, shards = found["once ddp"], found["once fsdp"]
    assert [m["loss"] for m in copies["metrics"]] == [m["loss"] for m in shards["metrics"]]
    for name, value in copies["weights"].items():
        assert torch.equal(shards["weights"][name], value), name
