"""Checkpoints: complete or absent, and the same training goes on from them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from distrl.errors import RunError
from distrl.models import load_model
from learners.checkpoint import CheckpointWriter, TrainState, checkpoint_name, checkpoint_sha256, load_checkpoint
from learners.optimizer import OptimizerSettings, make_optimizer
from learners.world import World
from tests.builders import refusal

torch.set_num_threads(1)

SETTINGS = OptimizerSettings(1e-2, 0, 0.1, (0.9, 0.95), 1.0)
STATE = TrainState(step=7, version=9)


def make_model(seed: int) -> Any:
    config = Qwen3Config(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    tokens = torch.arange(10)[None]
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(seed: int, steps: int) -> tuple[Any, torch.optim.Optimizer]:
    model = make_model(seed)
    optimizer = make_optimizer(model, SETTINGS)
    train(model, optimizer, steps)
    return model, optimizer


def save_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"tokens": 12}')


def save_checkpoint(
    directory: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    tokenizer: Callable[[Path], object],
) -> str:
    """Writes one and waits for it; its hash."""
    writer = CheckpointWriter(World(), tokenizer)
    writer.begin(directory, model, model, optimizer, state)
    written = writer.finished(wait=True)
    assert written is not None
    assert (written.location, written.state) == (str(directory), state)
    assert writer.finished(wait=True) is None  # said once
    return written.sha256


def write(directory: Path, state: TrainState = STATE, tokenizer: Callable[[Path], object] = save_tokenizer) -> str:
    model, optimizer = trained(seed=0, steps=2)
    return save_checkpoint(directory, model, optimizer, state, tokenizer)


def snapshot(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every number of a training state, by name."""
    values = {name: p.detach().clone() for name, p in model.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        values |= {f"{index}.{slot}": torch.as_tensor(value).clone() for slot, value in slots.items()}
    return values


def test_training_goes_on_exactly_where_it_stood(tmp_path: Path) -> None:
    model, optimizer = trained(seed=0, steps=3)
    save_checkpoint(tmp_path / "step-7", model, optimizer, STATE, save_tokenizer)
    other, its_optimizer = trained(seed=1, steps=1)

    assert load_checkpoint(tmp_path / "step-7", other, its_optimizer) == STATE
    for _ in range(2):
        expected, found = snapshot(model, optimizer), snapshot(other, its_optimizer)
        assert found.keys() == expected.keys()
        assert any(name.endswith("exp_avg_sq") for name in expected)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        train(model, optimizer, 1)
        train(other, its_optimizer, 1)


def test_a_checkpoint_is_a_model_directory(tmp_path: Path) -> None:
    model, optimizer = trained(seed=0, steps=1)
    save_checkpoint(tmp_path / "step-7", model, optimizer, STATE, save_tokenizer)
    loaded = load_model(tmp_path / "step-7", torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_the_hash_covers_every_file_s_name_and_bytes(tmp_path: Path) -> None:
    found = write(tmp_path / "step-7")

    digest = hashlib.sha256()
    root = tmp_path / "step-7"
    names = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.is_file()]
    assert {"config.json", "model.safetensors", "state.json", "tokenizer.json", "training/.metadata"} <= set(names)
    for name in names:
        digest.update(name.encode() + b"\0" + hashlib.sha256((tmp_path / "step-7" / name).read_bytes()).digest())
    assert found == digest.hexdigest() == checkpoint_sha256(tmp_path / "step-7")

    path = tmp_path / "step-7" / "tokenizer.json"
    path.write_text('{"tokens": 13}')
    assert checkpoint_sha256(tmp_path / "step-7") != found
    path.write_text('{"tokens": 12}')
    assert checkpoint_sha256(tmp_path / "step-7") == found
    path.rename(path.with_name("other.json"))
    assert checkpoint_sha256(tmp_path / "step-7") != found


def test_a_crash_while_writing_leaves_no_directory_of_that_name_and_the_next_attempt_succeeds(tmp_path: Path) -> None:
    def crash(directory: Path) -> None:
        save_tokenizer(directory)
        (directory / "half.json").write_text("{")
        raise OSError(28, "No space left on device")

    assert refusal(RunError, lambda: write(tmp_path / "step-7", tokenizer=crash)) == (
        f"checkpoint {tmp_path / 'step-7'}: cannot be written: No space left on device; make room, then go on with "
        "distrl resume"
    )
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "step-7.partial").mkdir()
    (tmp_path / "step-7.partial" / "half.json").write_text("{")  # of a process that was killed
    digest = write(tmp_path / "step-7")
    assert [p.name for p in tmp_path.iterdir()] == ["step-7"]
    assert checkpoint_sha256(tmp_path / "step-7") == digest
    assert not (tmp_path / "step-7" / "half.json").exists()


def test_the_folder_of_the_checkpoints_is_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "step-7")
    assert (tmp_path / "a" / "b" / "step-7" / "state.json").is_file()


def fresh() -> tuple[Any, torch.optim.Optimizer]:
    model = make_model(seed=1)
    return model, make_optimizer(model, SETTINGS)


def test_another_format_is_refused_by_name_and_nothing_is_loaded(tmp_path: Path) -> None:
    write(tmp_path / "step-7")
    path = tmp_path / "step-7" / "state.json"
    path.write_text(json.dumps({"step": 7, "version": 9, "format": 3, "anchors": []}))
    model, optimizer = fresh()
    before = snapshot(model, optimizer)

    assert refusal(RunError, lambda: load_checkpoint(tmp_path / "step-7", model, optimizer)) == (
        f"checkpoint {tmp_path / 'step-7'}: format must be 2, got 3; use the distrl that wrote it"
    )
    after = snapshot(model, optimizer)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    model, optimizer = fresh()
    missing = tmp_path / "step-8"
    assert refusal(RunError, lambda: load_checkpoint(missing, model, optimizer)) == (
        f"checkpoint {missing}: state.json must be there and readable: [Errno 2] No such file or directory: "
        f"'{missing / 'state.json'}'"
    )


@pytest.mark.parametrize("name", ["training/.metadata"])
def test_a_checkpoint_that_lost_a_file_is_refused_before_anything_is_loaded(tmp_path: Path, name: str) -> None:
    write(tmp_path / "step-7")
    (tmp_path / "step-7" / name).unlink()
    model, optimizer = fresh()
    before = snapshot(model, optimizer)

    assert refusal(RunError, lambda: load_checkpoint(tmp_path / "step-7", model, optimizer)) == (
        f"checkpoint {tmp_path / 'step-7'}: {name} must be there; the directory is not a complete checkpoint"
    )
    after = snapshot(model, optimizer)
    assert all(torch.equal(after[k], value) for k, value in before.items())


def test_what_is_written_is_what_stood_when_it_began(tmp_path: Path) -> None:
    """Training goes on while the thread writes, here until the gate opens."""
    model, optimizer = trained(seed=0, steps=2)
    expected = snapshot(model, optimizer)
    gate = Event()

    def save(directory: Path) -> None:
        assert gate.wait(20)
        save_tokenizer(directory)

    writer = CheckpointWriter(World(), save)
    writer.begin(tmp_path / "step-7", model, model, optimizer, STATE)
    assert writer.finished() is None
    train(model, optimizer, 3)
    gate.set()
    assert writer.finished(wait=True) is not None
    other, its_optimizer = fresh()
    load_checkpoint(tmp_path / "step-7", other, its_optimizer)
    found = snapshot(other, its_optimizer)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    exported = load_model(tmp_path / "step-7", torch.float32).state_dict()
    assert all(torch.equal(exported[name], expected[name]) for name in exported)


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "step-7")
    other = torch.nn.Linear(3, 2)
    message = refusal(RunError, lambda: load_checkpoint(tmp_path / "step-7", other, make_optimizer(other, SETTINGS)))
    assert message.startswith(
        f"checkpoint {tmp_path / 'step-7'}: the training state must be that of the model and the settings of the run: "
    )


def test_a_checkpoint_never_writes_over_another_of_its_name(tmp_path: Path) -> None:
    """The name has step and version, which is never used twice by one ledger; a ledger put back from a copy may."""
    state = TrainState(step=2, version=5)
    directory = tmp_path / checkpoint_name(state)
    assert directory.name == "step-000002-v5"
    first = write(directory, state)
    model, optimizer = trained(seed=1, steps=3)
    writer = CheckpointWriter(World(), save_tokenizer)
    writer.begin(directory, model, model, optimizer, state)
    again = writer.finished(wait=True)
    assert again is not None
    assert again.location == f"{directory}.2"
    assert checkpoint_sha256(directory) == first != again.sha256 == checkpoint_sha256(Path(again.location))
