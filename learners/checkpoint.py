"""Checkpoints: a Hugging Face model directory with the optimizer's state, complete or absent."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distrl.errors import RunError
from learners.anchors import Anchors

FORMAT = 1

ANCHORS = "anchors.pt"

TRAINING_FILES = ("optimizer.pt", "state.json", ANCHORS)
"""What a checkpoint has beyond a Hugging Face model directory."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """What beside weights and optimizer says where training stands."""

    step: int
    """Optimizer steps done."""
    version: int
    """Policy version of the weights."""
    format: int = FORMAT


def save_checkpoint(
    directory: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    save_tokenizer: Callable[[Path], object],
    anchors: Mapping[str, Any] | None = None,
) -> str:
    """Writes a checkpoint aside and renames it, so that a directory with this name is complete.

    Args:
        model: with `save_pretrained`.
        save_tokenizer: writes the tokenizer's files into the directory that it gets.
        anchors: state of the models that follow the policy, where there are some.
    Returns:
        sha256 over all files' names and bytes.
    """
    aside = directory.with_name(directory.name + ".partial")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    model.save_pretrained(aside)
    save_tokenizer(aside)
    torch.save(optimizer.state_dict(), aside / "optimizer.pt")
    if anchors:
        torch.save(dict(anchors), aside / ANCHORS)
    (aside / "state.json").write_text(json.dumps(asdict(state)) + "\n")
    digest = checkpoint_sha256(aside)
    for path in sorted(aside.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if directory.exists():
        shutil.rmtree(directory)  # left by a crash before the ledger named it
    aside.rename(directory)
    _sync(directory.parent)  # the new name must survive a crash too
    return digest


def load_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, anchors: Anchors | None = None
) -> TrainState:
    """Restores weights, optimizer and anchors in place.

    Raises:
        RunError: the directory is not a complete checkpoint, or of a newer format.
    """
    from safetensors.torch import load_model

    try:
        values: Mapping[str, Any] = json.loads((directory / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"checkpoint {directory}: state.json must be there and readable: {error}") from error
    if values["format"] > FORMAT:
        raise RunError(
            f"checkpoint {directory}: format must be at most {FORMAT}, got {values['format']}; "
            "use the distrl that wrote it"
        )
    for name in ("model.safetensors", "optimizer.pt"):
        if not (directory / name).is_file():
            raise RunError(f"checkpoint {directory}: {name} must be there; the directory is not a complete checkpoint")
    load_model(model, directory / "model.safetensors")
    optimizer.load_state_dict(torch.load(directory / "optimizer.pt", weights_only=True))
    if anchors is not None and anchors.names:
        if not (directory / ANCHORS).is_file():
            raise RunError(
                f"checkpoint {directory}: {ANCHORS} must be there, the objective keeps "
                f"{', '.join(sorted(anchors.names))}; go on with the objective that the run began with"
            )
        anchors.load_state_dict(torch.load(directory / ANCHORS, weights_only=True))
    return TrainState(**values)


def checkpoint_sha256(directory: Path) -> str:
    """Hash over the names and bytes of a checkpoint's files."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
