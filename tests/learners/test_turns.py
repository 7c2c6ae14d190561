"""A learner that takes turns leaves nothing on the device, and learns the same as one that stays."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distrl.objectives import Recipe, build
from learners.logp_check import LogpCheckSettings
from learners.optimizer import OptimizerSettings
from learners.trainer import LoopSettings, Trainer
from learners.turns import move
from tests.learners.workers import Tokenizer, make_model, tickets


def trainer_of(directory: Path, *, takes_turns: bool, recipe: Recipe) -> Trainer:
    settings = LoopSettings(
        steps=3,
        temperature=0.9,
        micro_batch_tokens=64,
        checkpoint_every_steps=10,
        checkpoints=directory,
        optimizer=OptimizerSettings(1e-2, 0, 0.1, (0.9, 0.95), 1.0),
        logp_check=LogpCheckSettings(0, 1.0, 0, "keep", 0.9),
        takes_turns=takes_turns,
    )
    return Trainer(make_model(torch.float32), Tokenizer(), recipe, settings)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All that is as large as the model: parameters, buffers, moments and anchors."""
    found: dict[str, Tensor] = dict(trainer.policy.named_parameters())
    found |= {f"buffer.{name}": tensor for name, tensor in trainer.policy.named_buffers()}
    for i, state in enumerate(trainer.optimizer.state.values()):
        found |= {f"optimizer.{i}.{name}": value for name, value in state.items() if name != "step"}
    for name, anchor in trainer.anchors.tensors().items():
        found |= {f"{name}.{key}": value for key, value in anchor.items() if key != "step"}
    return found


@pytest.mark.parametrize("recipe", ["dapo", "ppo"])  # with an anchor, with a value head
def test_a_move_takes_all_that_is_as_large_as_the_model_and_leaves_the_optimizer_its_parameters(
    recipe: str, tmp_path: Path
) -> None:
    options = {"kl_coefficient": 0.1, "reference": "reset"} if recipe == "dapo" else {}
    trainer = trainer_of(tmp_path, takes_turns=False, recipe=build(recipe, **options))
    trainer.step(trainer.training_batch(tickets(0)), 1)
    before = {name: tensor.clone() for name, tensor in everything(trainer).items()}
    kinds = {name.split(".")[0] for name in before}
    assert kinds == {"model", "optimizer", "buffer", "reference" if recipe == "dapo" else "value_head"}
    parameters = [id(p) for p in trainer.policy.parameters()]
    placed: set[int] = set()

    def place(tensor: Tensor) -> Tensor:
        moved = tensor.clone()
        placed.add(moved.data_ptr())
        return moved

    move(place, trainer.policy, trainer.optimizer, trainer.anchors)
    after = everything(trainer)
    assert [name for name, tensor in after.items() if tensor.data_ptr() not in placed] == []
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [id(p) for p in trainer.policy.parameters()] == parameters


def test_a_learner_that_comes_and_goes_learns_to_the_bit_what_one_does_that_stays(tmp_path: Path) -> None:
    stays, goes = (trainer_of(tmp_path, takes_turns=turns, recipe=build("ppo")) for turns in (False, True))
    for step in (1, 2, 3):
        stays.step(stays.training_batch(tickets(step)), step)
        with goes.on_device():
            goes.step(goes.training_batch(tickets(step)), step)
        expected, found = stays.policy_tensors(), goes.policy_tensors()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
