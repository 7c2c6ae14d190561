"""What lets a run outlive its directory: its config and copies of its ledger in `storage.uri`, and the way back."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from actors.keeper import copy_name
from deploy.checkpoints import fault_of
from deploy.run_dir import FORMAT, RunDir, write_json
from deploy.run_state import RunState
from deploy.run_storage import RunStorage, storage_at
from distrl.config import Config, dump_config
from distrl.errors import LedgerError, RefusedError, RunError
from distrl.ledger import Ledger
from distrl.ledger_reader import Checkpoint, LedgerReader
from distrl.storage import cause

CONFIG = "config.yaml"


@dataclass(frozen=True, slots=True)
class PutBack:
    """What a run's directory was made from."""

    checkpoint: Checkpoint
    lost_files: int
    """Journal files that were written after the copy: their rollouts are lost, and what they answer is sampled again
    or, where the tickets were not issued yet, drawn again."""


def check_unused(config: Config) -> None:
    """
    Raises:
        RefusedError: the storage has a run of this name. RunError: it cannot be reached.
    """
    storage = _apart(config)
    if storage is not None and _has_run(storage):
        raise RefusedError(
            f"run.name: {storage.folder} must not hold a run yet, a run never overwrites another; choose a new name "
            f"with run.name=..., or put its directory back: distrl resume {config.run_dir} --storage "
            f"{config.storage.uri}"
        )


def begin_storage(config: Config, run_dir: RunDir) -> None:
    """Leaves the config where the directory can be put back from.

    Raises:
        RunError: the storage cannot be written to; the directory is gone again.
    """
    storage = _apart(config)
    if storage is None:
        return
    try:
        storage.folder.make()
        storage.folder.write(CONFIG, dump_config(config).encode())
    except OSError as error:
        shutil.rmtree(run_dir.path)
        raise RunError(
            f"storage.uri: {storage.folder} must be writable: {cause(error)}; mend it and call again"
        ) from error


def is_kept_apart(config: Config) -> bool:
    """Whether the storage has the run, so that its directory can be put back."""
    storage = _apart(config)
    return storage is not None and _has_run(storage)


def _apart(config: Config) -> RunStorage | None:
    return None if config.storage.uri is None else storage_at(config.storage.uri, RunDir(config.run_dir.absolute()))


def _has_run(storage: RunStorage) -> bool:
    try:
        return CONFIG in storage.folder.files()
    except OSError as error:
        raise RunError(_told(storage, "reachable", error)) from error


def _told(storage: RunStorage, rule: str, error: OSError) -> str:
    return f"storage.uri: {storage.folder} must be {rule}: {cause(error)}; mend it and call again"


def put_back(path: Path, uri: str) -> PutBack:
    """Makes a run's directory again, from the newest copy of its ledger whose checkpoint is whole.

    What was trained after that checkpoint is lost with the directory. Tickets that the copy has as ready or trained are
    trained again, from the journal; those that it has as issued, and those that it does not know, are sampled again:
    the same prompts with the same noise. The metrics are lost.

    Raises:
        RefusedError: there is a directory, or no such run in the storage. RunError: it cannot be put back.
    """
    run_dir = RunDir(path.absolute())
    if run_dir.path.exists():
        raise RefusedError(
            f"--storage: {path} must not exist, a run is put back only where its directory is lost; leave --storage out"
        )
    storage = storage_at(uri, run_dir)
    if not _has_run(storage):
        raise RefusedError(f"--storage: {uri} must hold the run {run_dir.path.name}, {storage.folder} has no {CONFIG}")
    aside = RunDir(run_dir.path.with_name(f".{run_dir.path.name}.partial"))
    shutil.rmtree(aside.path, ignore_errors=True)
    aside.path.mkdir(parents=True)
    try:
        aside.config.write_bytes(storage.folder.read(CONFIG))
        checkpoint = _ledger_of_the_newest(storage, aside.ledger)
        lost = _note(storage, aside.ledger, checkpoint)
        write_json(
            aside.run_json,
            {"format": FORMAT, "name": run_dir.path.name, "state": RunState.STOPPED, "ended_s": time.time()},
        )
        aside.path.rename(run_dir.path)
    except OSError as error:
        raise RunError(
            f"storage.uri: {storage.folder} must be readable: {cause(error)}; mend it and call again"
        ) from error
    finally:
        shutil.rmtree(aside.path, ignore_errors=True)
    return PutBack(checkpoint, lost)


def _ledger_of_the_newest(storage: RunStorage, target: Path) -> Checkpoint:
    copies = storage.ledgers.files()
    faults = []
    for name in sorted(copies, key=_step_and_version, reverse=True):
        target.write_bytes(storage.ledgers.read(name))
        try:
            with LedgerReader(target) as ledger:
                last = ledger.last_checkpoint()
        except LedgerError as error:
            faults.append(f"{name}: {error}")
            continue
        if last is None or copy_name(last.path) != name:
            faults.append(f"{name}: its last checkpoint is another")
            continue
        fault = fault_of(storage.checkpoint(last.path), last.sha256)
        if fault is None:
            return last
        faults.append(f"{name}: checkpoint {fault}")
    seen = "; ".join(faults) or "there is none: the run had no checkpoint yet, start it anew under another name"
    raise RunError(f"storage.uri: {storage.ledgers} must hold a copy of the ledger whose checkpoint is whole: {seen}")


def _step_and_version(name: str) -> tuple[int, ...]:
    """Of `step-000020-v21.sqlite`; names of other forms come last."""
    parts = PurePosixPath(name).stem.removeprefix("step-").replace("v", "").replace(".", "-").split("-")
    return tuple(int(p) for p in parts) if all(p.isdigit() for p in parts) else (-1,)


def _note(storage: RunStorage, ledger: Path, checkpoint: Checkpoint) -> int:
    """Writes into the ledger that it is a copy, and how many journal files it does not know."""
    own = Ledger(ledger, owner="distrl resume --storage")
    try:
        known = {PurePosixPath(r["path"]).name for r in own.rows("SELECT path FROM journal_files")}
        lost = len([name for name in storage.journal.files() if name not in known])
        own.note_put_back(checkpoint.path, lost)
    finally:
        own.close()
    return lost
