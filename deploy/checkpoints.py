"""The checkpoint that a run goes on from, held against the hash that its ledger names."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from deploy.run_dir import RunDir
from deploy.run_storage import RunStorage, run_storage, sending
from distrl.errors import RunError
from distrl.ledger_reader import Checkpoint, LedgerReader
from distrl.storage import Folder, cause


def last_checkpoint(run_dir: RunDir) -> str | None:
    """Where the checkpoint lies that the run's ledger names last, its files verified; None where it names none.

    One that the ledger does not name does not exist, whatever lies in the directory.

    Raises:
        RunError: its files are missing, cut off or damaged, or cannot be reached; nothing was changed.
        LedgerError: the ledger cannot be read.
    """
    if not run_dir.ledger.exists():
        return None
    with LedgerReader(run_dir.ledger) as ledger:
        checkpoints = ledger.checkpoints() if ledger.begun() else []
    if not checkpoints:
        return None
    storage = run_storage(run_dir)
    folder = storage.checkpoint(checkpoints[-1].path)
    if fault := fault_of(folder, checkpoints[-1].sha256):
        raise RunError(f"checkpoint {folder}: {fault}; {_remedy(storage, checkpoints[:-1])}")
    return str(folder)


def fault_of(folder: Folder, sha256: str) -> str | None:
    """What is wrong with a checkpoint's files; None where nothing is."""
    try:
        if not folder.exists():
            return "must be there, the run's ledger names it"
        found = folder.sha256()
    except OSError as error:
        return f"must be readable: {cause(error)}"
    return None if found == sha256 else f"must have sha256 {sha256}, got {found}: its files were damaged"


def _remedy(storage: RunStorage, others: list[Checkpoint]) -> str:
    """Tickets that were committed with a checkpoint stay committed, so that the run cannot go back behind it."""
    if storage.folder.local is None:
        return "see that storage.uri can be reached, or put back a copy of it"
    good = next((c for c in reversed(others) if fault_of(storage.checkpoint(c.path), c.sha256) is None), None)
    if good is None:
        return "put back a copy of it"
    path = storage.checkpoint(good.path)
    return f"put back a copy of it, or begin a new run with model.path={path}, which is whole (step {good.step})"


def remove_unnamed(run_dir: RunDir) -> list[str]:
    """Deletes what a crash left of checkpoints that the ledger does not name; nobody may be writing one.

    Returns:
        Their names.
    Raises:
        RunError: it could not be deleted.
    """
    if not run_dir.ledger.exists():
        return []
    with LedgerReader(run_dir.ledger) as ledger:
        if not ledger.begun():
            return []
        named = {PurePosixPath(c.path).name for c in ledger.checkpoints()}
    folders = [run_storage(run_dir).checkpoints, Folder(sending(run_dir))]
    removed = []
    for folder in folders:
        try:
            for name in folder.folders():
                if name not in named:
                    (folder / name).delete_folder()
                    removed.append(name)
        except OSError as error:
            raise RunError(
                f"{folder}: checkpoints that the ledger does not name must be removable: {cause(error)}; mend it, then "
                "go on with distrl resume"
            ) from error
    return removed


@contextmanager
def local_checkpoint(storage: RunStorage, path: str) -> Iterator[Path]:
    """A checkpoint as a directory of this machine; a copy that goes away, where it lies elsewhere.

    Raises:
        RunError: it cannot be read.
    """
    folder = storage.checkpoint(path)
    if folder.local is not None:
        yield folder.local
        return
    with tempfile.TemporaryDirectory(prefix="distrl-checkpoint-") as directory:
        copy = Path(directory) / PurePosixPath(path).name
        try:
            folder.download(copy)
        except OSError as error:
            raise RunError(
                f"checkpoint {folder}: must be readable: {cause(error)}; see that storage.uri can be reached, then go "
                "on with distrl resume"
            ) from error
        yield copy
