"""A synchronous run that is killed ends with the files of one that was not; `make sigkill` has the long form."""

from pathlib import Path

import pytest
import torch

from learners.checkpoint import TrainState
from tests.learners.test_checkpoint import save_checkpoint, save_tokenizer, train, trained
from tests.system.sigkill import COMPARED, compare, contents


@pytest.mark.ray
@pytest.mark.nodes
def test_a_run_that_is_killed_and_resumed_ends_with_the_weights_and_optimizer_of_one_that_was_not(
    tmp_path: Path,
) -> None:
    found = compare(tmp_path, kills=1, seed=1)
    alone, killed = found.contents
    assert alone == killed
    assert found.equal  # and nothing is missing in both
    assert found.violations == ()
    assert len(found.killed_after) == 1
    assert found.unnamed % 2 == 0  # the step of a checkpoint that was complete, and not in the ledger


def test_what_is_compared_are_the_numbers_of_a_checkpoint_and_not_how_it_was_written(tmp_path: Path) -> None:
    model, optimizer = trained(seed=0, steps=2)

    def write(name: str, version: int) -> dict[str, str]:
        save_checkpoint(tmp_path / name, model, optimizer, TrainState(2, version), save_tokenizer)
        return contents(tmp_path / name)

    once, again = write("once", 2), write("again", 3)
    metadata = "training/.metadata"
    assert (tmp_path / "once" / metadata).read_bytes() != (tmp_path / "again" / metadata).read_bytes()
    assert once == again
    assert all(any(name.startswith(begin) for name in once) for begin in COMPARED)
    moments = [f"training/optimizer/state/{name}/exp_avg" for name, _ in model.named_parameters()]
    assert set(moments) <= once.keys()

    before = next(iter(model.parameters())).detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(next(iter(model.parameters())), before)
    later = write("later", 2)
    assert later.keys() == once.keys()
    assert all(later[name] != once[name] for name in moments)
    assert later["model.safetensors"] != once["model.safetensors"]
