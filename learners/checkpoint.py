"""Checkpoints: a Hugging Face model directory with the training state beside it, complete or absent.

The training state is sharded as the workers are and loads into any number of them (torch.distributed.checkpoint). It is
copied in the training loop and written in a thread.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from distrl.errors import RunError
from distrl.storage import Folder, cause, combined, file_digest, sync
from learners.gathering import whole_tensors
from learners.world import World, another_is_gone

FORMAT = 2

TRAINING = "training"
"""Directory of the sharded state: trained parameters, value head and optimizer."""

TRAINING_FILES = (TRAINING, "state.json")
"""What a checkpoint has beyond a Hugging Face model directory."""

# Said of every checkpoint of a single worker, which is no mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

Anchored = Mapping[str, Mapping[str, Tensor]]
"""By name, the parameters of a model that follows the policy."""

_OPTIONS = StateDictOptions(ignore_frozen_params=True)


@dataclass(frozen=True, slots=True)
class TrainState:
    """What beside weights and optimizer says where training stands."""

    step: int
    """Optimizer steps done."""
    version: int
    """Policy version of the weights."""
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint that is complete on disk."""

    location: str
    """Its directory, or its address in the storage."""
    state: TrainState
    sha256: str
    """Over all files' names and bytes."""


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread, while training goes on.

    Args:
        save_tokenizer: writes the tokenizer's files into the directory that it gets.
        storage: where checkpoints are sent from the directory that they are written in; None leaves them there.
    """

    def __init__(self, world: World, save_tokenizer: Callable[[Path], object], storage: Folder | None = None) -> None:
        self._world = world
        self._storage = storage
        self._save_tokenizer = save_tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Path, Future[Written | None]] | None = None

    def begin(
        self,
        directory: Path,
        model: Any,
        trained: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
        anchors: Anchored | None = None,
    ) -> None:
        """Copies what is to be written and starts to write it; `finished` must have been called since the last one.

        Every worker calls it.

        Args:
            directory: appears when everything in it is written.
            model: the Hugging Face model, with `save_pretrained`.
            trained: the module that `optimizer` was made for.
            anchors: of the models that follow the policy.
        """
        aside = self._aside(directory)
        if self._storage is None:
            self._world.from_first(lambda: _make_empty(aside))
        else:
            _make_empty(aside)
        weights, options = get_state_dict(trained, optimizer, options=_OPTIONS)
        sharded = _copy({"weights": weights, "optimizer": options, **_kept(anchors)})
        whole = _copy(whole_tensors(model, self._world.first))
        writing = self._thread.submit(self._write, directory, aside, model, sharded, whole, state)
        self._pending = directory, writing

    def finished(self, wait: bool = False) -> Written | None:
        """What has been written since `begin`, once; None while nothing has, and on every worker but the first.

        Raises:
            RunError: it could not be written; nothing is left of it.
        """
        if self._pending is None or not (wait or self._pending[1].done()):
            return None
        (directory, writing), self._pending = self._pending, None
        try:
            return writing.result()
        except (Exception, CheckpointException) as error:
            if another_is_gone(error):
                raise  # no fault of the disk: the group is started again
            if self._world.first:
                # A full disk needs the room back; what cannot be removed goes before the next attempt.
                shutil.rmtree(self._aside(directory), ignore_errors=True)
            where, remedy = str(directory), "make room"
            if self._storage is not None:
                where = str(self._storage / directory.name)
                remedy = "make room here, and see that storage.uri can be reached and written to"
            raise RunError(
                f"checkpoint {where}: cannot be written: {_cause(error)}; {remedy}, then go on with distrl resume"
            ) from error

    def _write(
        self,
        directory: Path,
        aside: Path,
        model: Any,
        sharded: Mapping[str, Any],
        whole: Mapping[str, Tensor],
        state: TrainState,
    ) -> Written | None:
        state_dict_saver.save(
            dict(sharded),
            checkpoint_id=aside / TRAINING,
            process_group=self._world.files,
            no_dist=self._world.size == 1,
        )
        if self._world.first:
            self._write_model(aside, model, whole, state)
        if self._storage is not None:
            return self._send(self._storage / directory.name, aside, state)
        if not self._world.first:
            return None
        digest = checkpoint_sha256(aside)
        for path in _files(aside):
            sync(path)
        for path in (aside / TRAINING, aside):
            sync(path)
        directory = _unused(directory)
        aside.rename(directory)
        sync(directory.parent)  # the new name must survive a crash too
        return Written(str(directory), state, digest)

    def _write_model(self, aside: Path, model: Any, whole: Mapping[str, Tensor], state: TrainState) -> None:
        model.save_pretrained(aside, state_dict=dict(whole))
        self._save_tokenizer(aside)
        (aside / "state.json").write_text(json.dumps(asdict(state)) + "\n")

    def _send(self, folder: Folder, aside: Path, state: TrainState) -> Written | None:
        """Every worker sends what it wrote. It is no checkpoint before the ledger names it, however far this came."""
        own = {}
        failure: BaseException | None = None
        try:
            for path in _files(aside):
                name = path.relative_to(aside).as_posix()
                own[name] = file_digest(path)
                folder.write_file(name, path)
            shutil.rmtree(aside)
        except OSError as error:
            failure = error
        # Also where it failed: the others wait here.
        everyone = self._world.gather_files((own, None if failure is None else cause(failure)))  # type: ignore[arg-type]
        if failure is not None:
            raise failure
        for _, failed in everyone:
            if failed is not None:
                raise OSError(f"another worker failed: {failed}")
        digests = {name: digest for part, _ in everyone for name, digest in part.items()}
        return Written(str(folder), state, combined(digests)) if self._world.first else None

    def _aside(self, directory: Path) -> Path:
        # Workers on several machines write side by side, and each sends its own part.
        rank = "" if self._storage is None else f".{self._world.rank}"
        return directory.with_name(f"{directory.name}{rank}.partial")


def checkpoint_name(state: TrainState) -> str:
    """Of a checkpoint's directory. Version numbers are never used twice, so that no learner writes over another's."""
    return f"step-{state.step:06d}-v{state.version}"


def load_checkpoint(
    directory: Path,
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World | None = None,
    anchors: Anchored | None = None,
) -> TrainState:
    """Restores trained parameters, optimizer and anchors in place; every worker calls it and reads its own part.

    Raises:
        RunError: the directory is not a complete checkpoint, of another format, or of another model.
    """
    world = world or World()
    try:
        values: Mapping[str, Any] = json.loads((directory / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"checkpoint {directory}: state.json must be there and readable: {error}") from error
    if values["format"] != FORMAT:
        raise RunError(
            f"checkpoint {directory}: format must be {FORMAT}, got {values['format']}; use the distrl that wrote it"
        )
    if not (directory / TRAINING / ".metadata").is_file():
        raise RunError(
            f"checkpoint {directory}: {TRAINING}/.metadata must be there; the directory is not a complete checkpoint"
        )
    weights, options = get_state_dict(trained, optimizer, options=_OPTIONS)
    found: dict[str, Any] = {"weights": weights, "optimizer": options, **_kept(anchors)}
    try:
        state_dict_loader.load(
            found,
            checkpoint_id=directory / TRAINING,
            process_group=world.files,
            no_dist=world.size == 1,
        )
    except (Exception, CheckpointException) as error:
        if another_is_gone(error):
            raise
        raise RunError(
            f"checkpoint {directory}: the training state must be that of the model and the settings of the run: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        ) from error
    set_state_dict(
        trained,
        optimizer,
        model_state_dict=found["weights"],
        optim_state_dict=found["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
    return TrainState(**values)


def checkpoint_sha256(directory: Path) -> str:
    """Hash over the names, with their folders, and the bytes of a checkpoint's files."""
    return combined({path.relative_to(directory).as_posix(): file_digest(path) for path in _files(directory)})


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _unused(directory: Path) -> Path:
    """What has the name already may be named by another ledger, of a run whose directory was put back from a copy."""
    number, found = 1, directory
    while found.exists():
        number += 1
        found = directory.with_name(f"{directory.name}.{number}")
    return found


def _cause(error: BaseException) -> str:
    """What the disk said, without the tracebacks of all workers that torch.distributed.checkpoint puts around it."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError):
        return cause(error)
    return f"{type(error).__name__}: {error}"


def _make_empty(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def _copy(state: Any) -> Any:
    """A copy on the CPU, shards as shards: training goes on with the originals."""
    if isinstance(state, Mapping):
        return {name: _copy(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_copy(value) for value in state]
    return state.detach().to("cpu", copy=True) if isinstance(state, Tensor) else state


def _kept(anchors: Anchored | None) -> dict[str, Anchored]:
    """A checkpoint of an objective without anchors has no entry for them."""
    return {"anchors": anchors} if anchors else {}
