"""Kills a real run with SIGKILL at steps that a seed draws, resumes it each time, and compares it with one left alone.

python -m tests.system.sigkill --kills 5 --seed 0
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from deploy.audit import audit_run
from deploy.checkpoints import last_checkpoint
from deploy.run_dir import RunDir
from distrl.ledger_reader import LOCK_S, LedgerReader
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from learners.checkpoint import TRAINING

STEPS = 12
DEADLINE_S = 300.0
"""Seconds that one part of a run may take."""
COMPARED = ("model.safetensors", f"{TRAINING}/weights/", f"{TRAINING}/optimizer/state/", f"{TRAINING}/optimizer/param_")
"""Beginnings of names that there must be in a comparison."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A run that was killed, beside one that was not."""

    killed_after: tuple[int, ...]
    """Steps that were done at each SIGKILL at a random moment."""
    unnamed: int
    """Step of the checkpoint that was complete on disk, and not in the ledger, at the SIGKILL before these."""
    returned: dict[str, int]
    """Tickets that went back, by cause."""
    violations: tuple[Any, ...]
    contents: tuple[dict[str, str], dict[str, str]]
    """sha256 of what the last checkpoint holds, of the run left alone and of the killed one; see `contents`."""

    @property
    def equal(self) -> bool:
        alone, killed = self.contents
        return alone == killed and all(any(name.startswith(begin) for name in alone) for begin in COMPARED)


def compare(folder: Path, kills: int, seed: int, changes: Mapping[str, Any] | None = None) -> Compared:
    """Trains twice, synchronously and with the same seed.

    Beside `kills` SIGKILLs at random moments there is one between a checkpoint's last file and its name in the ledger.

    Args:
        changes: sections of the config beside those of `_config`.
    """
    make_tiny_model(
        folder / "model",
        character_tokenizer(ALPHABET),
        seed=0,
        architecture=TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64),
    )
    alone, killed = (_config(folder, name, changes or {}) for name in ("alone", "killed"))
    assert _start("train", alone).wait(DEADLINE_S) == 0, (folder / "log").read_text()
    rng = random.Random(seed)
    unnamed = _kill_before_the_ledger_names_it(folder, killed)
    after = tuple(_kill_at(folder, killed, at, rng) for at in sorted(rng.sample(range(6, STEPS), kills)))
    assert _start("resume", folder / "killed").wait(DEADLINE_S) == 0, (folder / "log").read_text()
    found = audit_run(folder / "killed")
    return Compared(
        after,
        unnamed,
        dict(found.returned),
        found.violations,
        (contents(_last(folder / "alone")), contents(_last(folder / "killed"))),
    )


def _config(folder: Path, name: str, changes: Mapping[str, Any]) -> Path:
    values = {
        "run": {"dir": str(folder), "name": name},
        "model": {"path": str(folder / "model")},
        "data": {"source": "sort_digits", "heldout_size": 16, "options": {"digits": 4}},
        "rollout": {"group_size": 4, "max_new_tokens": 6},
        "generation": {"actors": 2, "slots": 16},
        "train": {
            "steps": STEPS,
            "tickets_per_step": 4,
            "learning_rate": 1e-3,
            "checkpoint_every_steps": 2,
            "max_staleness": 0,
        },
        "evaluation": {"problems": 16, "every_steps": 0},
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _start(command: str, argument: Path, *options: str) -> "subprocess.Popen[bytes]":
    log = (argument.parent / "log").open("ab")
    with log:
        return subprocess.Popen(
            [sys.executable, "-c", "from deploy.cli import main; main()", command, str(argument), *options],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )


def _kill_at(folder: Path, config: Path, step: int, rng: random.Random) -> int:
    """Starts or resumes the run, kills all its processes at a random moment after a step; how many steps were done."""
    run = folder / "killed"
    before = _lines(run)
    driver = _go_on(run, config)
    deadline = time.monotonic() + DEADLINE_S
    while _steps(run, before) < step:
        if driver.poll() is not None or time.monotonic() > deadline:
            _end(driver)
            raise AssertionError(f"the run did not reach step {step}:\n{(folder / 'log').read_text()}")
        time.sleep(0.02)
    time.sleep(rng.random() * 0.5)
    _kill(driver)
    done = _steps(run, before)
    assert audit_run(run).violations == ()
    return done


def _kill_before_the_ledger_names_it(folder: Path, config: Path) -> int:
    """Kills the run when a checkpoint after the first is complete on disk and not in the ledger; its step.

    The ledger's write lock is the gate: while it is held here, no other process can name a checkpoint.
    """
    run = folder / "killed"
    driver = _go_on(run, config)
    deadline = time.monotonic() + DEADLINE_S
    while True:
        if driver.poll() is not None or time.monotonic() > deadline:
            _end(driver)
            raise AssertionError(f"no checkpoint was caught:\n{(folder / 'log').read_text()}")
        named = _named(run)
        if named and (begun := {name.removesuffix(".partial") for name in _directories(run, "step-*")} - named):
            with _writing_locked(run):
                # The ledger's own processes wait LOCK_S for the lock; the files need far less.
                give_up = time.monotonic() + LOCK_S / 2
                caught: set[str] = set()
                while not caught and time.monotonic() < give_up:
                    caught = {n for n in _directories(run, "step-*") - _named(run) if not n.endswith(".partial")}
                    if not begun - _named(run):
                        break  # it was named before the lock was had
                if caught:
                    _kill(driver)
                    break
        time.sleep(0.002)
    (name,) = caught
    assert name not in _named(run)
    last = last_checkpoint(RunDir(run))
    assert last is not None
    assert Path(last).name in _named(run)
    assert _step(Path(last).name) < _step(name)
    assert audit_run(run).violations == ()
    return _step(name)


def _step(checkpoint: str) -> int:
    return int(checkpoint.split("-")[1])


def _go_on(run: Path, config: Path) -> "subprocess.Popen[bytes]":
    return _start("resume", run) if run.exists() else _start("train", config)


def _kill(driver: "subprocess.Popen[bytes]") -> None:
    assert driver.poll() is None, "the run ended before it was killed"
    _end(driver)


def _end(driver: "subprocess.Popen[bytes]") -> None:
    for pid in [driver.pid, *_descendants(driver.pid)]:
        with contextlib.suppress(ProcessLookupError):  # it ended with one that was killed before it
            os.kill(pid, signal.SIGKILL)
    driver.wait()


def _directories(run: Path, pattern: str) -> set[str]:
    """Names of checkpoints; one that is being written ends in .partial."""
    return {path.name for path in (run / "checkpoints").glob(pattern)}


@contextlib.contextmanager
def _writing_locked(run: Path) -> Iterator[None]:
    db = sqlite3.connect(run / "ledger.sqlite", isolation_level=None, timeout=LOCK_S)
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")
    finally:
        db.close()


def _lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def _steps(run: Path, before: int) -> int:
    """The last step in the metrics beyond their first `before` lines."""
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        return 0
    lines = [line for line in metrics.read_text().splitlines(keepends=True)[before:] if line.endswith("\n")]
    return max((r["step"] for r in map(json.loads, lines) if r["kind"] == "step"), default=0)


def _named(run: Path) -> set[str]:
    """Names of the checkpoints in the ledger, those included that it has given up."""
    if not _directories(run, "step-*"):
        return set()  # the ledger may have no tables yet
    with LedgerReader(run / "ledger.sqlite") as ledger:
        return {Path(row["path"]).name for row in ledger.rows("SELECT path FROM checkpoints")}


def _descendants(pid: int) -> Iterator[int]:
    """Processes that a process started, and those that these started, from /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended meanwhile
        children.setdefault(parent, []).append(int(path.parent.name))
    open_ = [pid]
    while open_:
        found = children.get(open_.pop(), [])
        yield from found
        open_ += found


def _last(run: Path) -> Path:
    last = last_checkpoint(RunDir(run))
    assert last is not None
    assert _step(Path(last).name) == STEPS
    return Path(last)


def contents(checkpoint: Path) -> dict[str, str]:
    """sha256 of every tensor and setting of the sharded training state, and of the other files.

    Without state.json, which names the policy version, and version numbers are never used twice; the sharded state by
    its content, as its files carry an identifier of their own writing.
    """
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(checkpoint.iterdir())
        if path.is_file() and path.name != "state.json"
    }
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.pt"
        dcp_to_torch_save(checkpoint / TRAINING, whole)
        return found | dict(_hashed(torch.load(whole, weights_only=True), TRAINING))


def _hashed(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _hashed(inner, f"{name}/{key}")
        return
    what = repr(value)
    data = b""
    if isinstance(value, torch.Tensor):
        what = f"{value.dtype} {tuple(value.shape)}"
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    yield name, hashlib.sha256(what.encode() + b"\0" + data).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distrl-sigkill-") as folder:
        found = compare(Path(folder), arguments.kills, arguments.seed)
    alone, killed = found.contents
    print(
        f"a SIGKILL before the ledger named the checkpoint of step {found.unnamed}, {arguments.kills} after steps "
        f"{found.killed_after} of {STEPS}; went back: {found.returned}"
    )
    for name in alone | killed:
        same = alone.get(name) == killed.get(name)
        print(f"{'equal    ' if same else 'DIFFERENT'} {killed.get(name)} {name}")
    for violation in found.violations:
        print(f"VIOLATION {violation.rule}: {violation.detail}")
    return int(not found.equal or bool(found.violations))


if __name__ == "__main__":
    sys.exit(main())
