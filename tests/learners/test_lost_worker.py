"""A worker dies while the others write or read a checkpoint with it: the group is started again, the run goes on."""

import os
from pathlib import Path

import pytest

from distrl.errors import RunError
from learners.checkpoint import CheckpointWriter, TrainState, load_checkpoint
from learners.optimizer import OptimizerSettings, make_optimizer
from learners.world import World
from tests.learners.workers import Tokenizer, make_model, spawn

SETTINGS = OptimizerSettings(1e-2, 0, 0.1, (0.9, 0.95), 1.0)


def _dies_while_it_is_written(world: World, directory: Path) -> None:
    if not world.first:
        world.from_first(lambda: None)  # the folder is made
        os._exit(0)
    model = make_model()
    writer = CheckpointWriter(world, Tokenizer().save_pretrained)
    writer.begin(directory, model, model, make_optimizer(model, SETTINGS), TrainState(1, 1))
    with pytest.raises(RuntimeError) as caught:
        writer.finished(wait=True)
    # A RunError would end the run, with the disk to blame.
    assert not isinstance(caught.value, RunError), caught.value
    assert not directory.exists()


def _dies_while_it_is_read(world: World, directory: Path) -> None:
    if not world.first:
        os._exit(0)
    model = make_model()
    with pytest.raises(BaseException) as caught:  # noqa: PT011  (torch's own for checkpoints is no Exception)
        load_checkpoint(directory, model, make_optimizer(model, SETTINGS), world)
    assert not isinstance(caught.value, RunError), caught.value


def test_a_worker_that_dies_while_a_checkpoint_is_written_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    spawn(_dies_while_it_is_written, 2, tmp_path / "step-000001")


def test_a_worker_that_dies_while_a_checkpoint_is_read_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    model = make_model()
    writer = CheckpointWriter(World(), Tokenizer().save_pretrained)
    writer.begin(tmp_path / "step-000001", model, model, make_optimizer(model, SETTINGS), TrainState(1, 1))
    assert writer.finished(wait=True) is not None
    spawn(_dies_while_it_is_read, 2, tmp_path / "step-000001")
