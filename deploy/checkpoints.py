"""The checkpoint that a run goes on from, held against the hash that its ledger names."""

from pathlib import Path

from deploy.run_dir import RunDir
from distrl.errors import RunError
from distrl.ledger_reader import Checkpoint, LedgerReader
from learners.checkpoint import checkpoint_sha256


def last_checkpoint(run_dir: RunDir) -> Path | None:
    """The checkpoint that the run's ledger names last, its files verified; None where it names none.

    One that the ledger does not name does not exist, whatever lies in the directory.

    Raises:
        RunError: its files are missing, cut off or damaged; nothing was changed.
        LedgerError: the ledger cannot be read.
    """
    if not run_dir.ledger.exists():
        return None
    with LedgerReader(run_dir.ledger) as ledger:
        checkpoints = ledger.checkpoints() if ledger.begun() else []
    if not checkpoints:
        return None
    last = checkpoints[-1]
    path = Path(last.path)
    if fault := _fault(path, last.sha256):
        raise RunError(f"checkpoint {path}: {fault}; {_remedy(checkpoints[:-1])}")
    return path


def _fault(path: Path, sha256: str) -> str | None:
    if not path.is_dir():
        return "must be there, the run's ledger names it"
    try:
        found = checkpoint_sha256(path)
    except OSError as error:
        return f"must be readable: {error.strerror}"
    return None if found == sha256 else f"must have sha256 {sha256}, got {found}: its files were damaged"


def _remedy(others: list[Checkpoint]) -> str:
    """Tickets that were committed with a checkpoint stay committed, so that the run cannot go back behind it."""
    good = next((c for c in reversed(others) if _fault(Path(c.path), c.sha256) is None), None)
    if good is None:
        return "put back a copy of it"
    return f"put back a copy of it, or begin a new run with model.path={good.path}, which is whole (step {good.step})"
