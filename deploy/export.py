"""A run's checkpoint as a clean Hugging Face directory: what the ledger names, verified, without training state."""

import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deploy.checkpoints import local_checkpoint
from deploy.run_dir import RunDir, find_run, write_json
from deploy.run_storage import run_storage
from distrl.errors import RefusedError, RunError
from learners.checkpoint import TRAINING_FILES, checkpoint_sha256

FORMAT = 1
CARD = "distrl.json"
"""Says what was exported."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A row of the ledger's table of checkpoints."""

    name: str
    """Of its directory, such as `step-000020-v20`: step and policy version."""
    step: int
    version: int
    sha256: str
    accuracy: float | None
    """On held-out problems, of the last evaluation that began at its step; None without one."""

    @property
    def step_name(self) -> str:
        """Its name to people: a ledger commits a step once."""
        return f"step-{self.step:06d}"


def export(run: Path, which: str = "last", out: Path | None = None) -> dict[str, Any]:
    """Writes a checkpoint as a Hugging Face directory that is complete or absent.

    Args:
        run: the run's directory.
        which: `last`, `best` (by held-out accuracy) or a step such as `step-000020`.
        out: the directory to make; None is `exports/step-NNNNNN` in the run's directory.
    Returns:
        What `distrl.json` in the directory says, and `path`.
    Raises:
        RefusedError: there is no such run or checkpoint, or `out` exists.
        RunError: the checkpoint's files are not those that the ledger names, or cannot be written.
    """
    run_dir = find_run(run)
    found = choose(run_dir, checkpoints(run_dir), which)
    target = (out if out is not None else run_dir.path / "exports" / found.step_name).absolute()
    if target.exists():
        raise RefusedError(
            f"--out: {target} must not exist yet, export never overwrites anything; choose another directory or delete "
            "it"
        )
    card = {"format": FORMAT, "run": run_dir.path.name, "checkpoint": found.step_name, **asdict(found)}
    del card["name"]
    with local_checkpoint(run_storage(run_dir), found.name) as source:
        _verify(source, found)
        _copy(source, target, card)
    return {**card, "path": str(target)}


def checkpoints(run_dir: RunDir) -> list[Checkpoint]:
    """The checkpoints that the ledger names, in the order in which they were committed."""
    if not run_dir.ledger.is_file():
        return []
    # By row, neither by time nor by step: clocks go back, and so do steps after a rollback.
    query = (
        "SELECT path, step, version, sha256, (SELECT accuracy FROM evaluations WHERE evaluations.step ="
        " checkpoints.step ORDER BY evaluation DESC LIMIT 1) FROM checkpoints WHERE removed_s IS NULL"
        " ORDER BY checkpoints.rowid"
    )
    # Read only, a run that goes on must not be touched. One without a write-ahead log has no writer; said so, SQLite
    # makes no files beside it, and it can be read where the folder is not ours.
    idle = not run_dir.ledger.with_name(run_dir.ledger.name + "-wal").exists()
    uri = f"file:{quote(str(run_dir.ledger))}?mode=ro{'&immutable=1' if idle else ''}"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as db:
            rows = db.execute(query).fetchall()
    except sqlite3.Error as error:
        raise RunError(f"RUN: {run_dir.ledger} must be a readable ledger: {error}; restore it") from error
    # By name: the run's directory may have been moved since.
    return [Checkpoint(Path(path).name, *others) for path, *others in rows]


def choose(run_dir: RunDir, known: list[Checkpoint], which: str) -> Checkpoint:
    """The checkpoint of that name; `best` is the latest of those with the highest accuracy.

    Raises:
        RefusedError: there is none.
    """
    if not known:
        raise RefusedError(
            f"RUN: {run_dir.path} must have a checkpoint, its ledger names none yet; wait for the first one "
            "(train.checkpoint_every_steps)"
        )
    if which == "last":
        return known[-1]
    if which == "best":
        measured = [(one.accuracy, index) for index, one in enumerate(known) if one.accuracy is not None]
        if not measured:
            raise RefusedError(
                "--checkpoint best needs a held-out evaluation at the step of a checkpoint, got none; use last, or "
                "measure checkpoints with distrl eval"
            )
        return known[max(measured)[1]]
    for one in reversed(known):
        if which in (one.step_name, one.name):
            return one
    names = ", ".join(dict.fromkeys(one.step_name for one in known))
    raise RefusedError(f"--checkpoint must be last, best or one that the ledger names ({names}), got {which!r}")


def _verify(source: Path, expected: Checkpoint) -> None:
    """
    Raises:
        RunError: the directory is missing, or its bytes are not those that were committed.
    """
    if not source.is_dir():
        raise RunError(f"checkpoint {source} is named by the ledger but missing; restore it or export another one")
    found = checkpoint_sha256(source)
    if found != expected.sha256:
        raise RunError(
            f"checkpoint {source} must have sha256 {expected.sha256}, got {found}; its files were changed after it "
            "was written: restore it or export another one"
        )


def _copy(source: Path, target: Path, card: dict[str, Any]) -> None:
    """Copies all but the training state aside and renames it."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # left by a killed export that had this process id
        shutil.copytree(source, aside, ignore=shutil.ignore_patterns(*TRAINING_FILES))
        write_json(aside / CARD, card)
        for path in aside.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        aside.rename(target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(
            f"--out: {target} cannot be written: {error.strerror}; nothing is left of it: make room or choose another "
            "place"
        ) from error
