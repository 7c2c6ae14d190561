"""Anchors follow the policy by the formulas of their upkeep, and leave it as it is when they are scored."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distrl.objectives import build
from distrl.objectives.upkeep import EMA, Frozen, Mixture, Reset, Upkeep
from learners.anchors import Anchors
from learners.checkpoint import CheckpointWriter, TrainState, load_checkpoint
from learners.world import World


def trained(upkeep: dict[str, Upkeep], values: list[float]) -> tuple[nn.Linear, torch.optim.AdamW, Anchors]:
    """A model of one weight that starts at 0 and has `values` after steps 1, 2, ..."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        model.weight.zero_()
    anchors = Anchors(model, upkeep, optimizer)
    for step, value in enumerate(values, 1):
        with torch.no_grad():
            model.weight.fill_(value)
        anchors.after_step(step)
    return model, optimizer, anchors


def weight(model: nn.Linear, anchors: Anchors, name: str) -> float:
    with anchors.in_place_of_the_policy(name):
        return float(model.weight.detach())


def test_a_moving_average_is_its_closed_form() -> None:
    values, rate = [1.0, 2.0, -4.0], 0.25
    model, _, anchors = trained({"anchor": EMA(rate)}, values)
    closed = sum(rate * (1 - rate) ** (len(values) - 1 - i) * value for i, value in enumerate(values))
    assert weight(model, anchors, "anchor") == pytest.approx(closed)
    assert anchors.changed("anchor") == 3


@pytest.mark.parametrize(("rate", "kept"), [(1.0, 7.0), (0.0, 0.0)])
def test_a_rate_of_1_is_the_policy_and_0_its_start(rate: float, kept: float) -> None:
    model, _, anchors = trained({"anchor": EMA(rate)}, [3.0, 7.0])
    assert weight(model, anchors, "anchor") == kept


def test_the_half_steps_of_mirror_prox_renew_the_opponent_twice_as_often_as_the_anchor() -> None:
    """Steps 1, 2: both are the start; 3, 4: the opponent is the policy after 2; then both are renewed."""
    upkeep = build("nash_mp", target="snapshot", snapshot_every=2).upkeep
    seen = []
    for steps in range(6):
        model, _, anchors = trained(dict(upkeep), [float(i + 1) for i in range(steps)])
        seen.append((weight(model, anchors, "opponent"), weight(model, anchors, "anchor")))
    assert seen == [(0.0, 0.0), (0.0, 0.0), (2.0, 0.0), (2.0, 0.0), (4.0, 4.0), (4.0, 4.0)]


def test_scoring_an_anchor_gives_the_policy_back_to_the_bit() -> None:
    model, _, anchors = trained({"anchor": EMA(0.3)}, [0.1, 0.7])
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="in the middle"), anchors.in_place_of_the_policy("anchor"):
        raise RuntimeError("in the middle")
    assert torch.equal(model.weight, before)


def test_a_reset_takes_the_policy_and_empties_the_optimizer() -> None:
    model, optimizer, anchors = trained({"reference": Reset(2)}, [])
    for step in (1, 2):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        anchors.after_step(step)
        assert bool(optimizer.state) == (step == 1)
    assert weight(model, anchors, "reference") == float(model.weight.detach()) != 0.0


def test_a_frozen_model_is_none_that_follows() -> None:
    assert trained({"reference": Frozen()}, [1.0])[2].names == frozenset()


def test_of_a_mixture_the_policy_is_the_part_that_follows_and_nothing_is_copied() -> None:
    model, _, anchors = trained({"opponent": Mixture(0.5)}, [3.0, 7.0])
    assert anchors.changed("opponent") == 2
    assert weight(model, anchors, "opponent") == 7.0
    assert anchors.tensors()["opponent"].keys() == {"step"}


class Saved(nn.Linear):
    def save_pretrained(self, directory: Path, state_dict: dict[str, Tensor]) -> None:
        torch.save(state_dict, directory / "model.pt")


def test_a_checkpoint_restores_anchors_and_when_they_changed(tmp_path: Path) -> None:
    def make() -> tuple[Saved, torch.optim.AdamW, Anchors]:
        model = Saved(1, 1, bias=False)
        optimizer = torch.optim.AdamW(model.parameters())
        return model, optimizer, Anchors(model, {"anchor": EMA(0.5), "opponent": EMA(0.5)}, optimizer)

    model, optimizer, anchors = make()
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    anchors.after_step(1)
    kept = weight(model, anchors, "anchor")
    writer = CheckpointWriter(World(), lambda directory: None)
    writer.begin(tmp_path / "step-1", model, model, optimizer, TrainState(1, 1), anchors.tensors())
    assert writer.finished(wait=True) is not None

    other, fresh, restored = make()
    load_checkpoint(tmp_path / "step-1", other, fresh, World(), restored.tensors())
    assert (
        weight(other, restored, "opponent") == weight(other, restored, "anchor") == kept != float(other.weight.detach())
    )
    assert restored.changed("opponent") == 1
