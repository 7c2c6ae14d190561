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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deploy.audit import audit_run
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer

STEPS = 12
DEADLINE_S = 300.0
"""Seconds that one part of a run may take."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A run that was killed, beside one that was not."""

    killed_after: tuple[int, ...]
    """Steps that were done at each SIGKILL."""
    returned: dict[str, int]
    """Tickets that went back, by cause."""
    violations: tuple[Any, ...]
    files: tuple[dict[str, str], dict[str, str]]
    """sha256 of the files of the last checkpoint, of the run left alone and of the killed one."""


def compare(folder: Path, kills: int, seed: int) -> Compared:
    """Trains twice, synchronously and with the same seed."""
    make_tiny_model(
        folder / "model",
        character_tokenizer(ALPHABET),
        seed=0,
        architecture=TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64),
    )
    alone, killed = _config(folder, "alone"), _config(folder, "killed")
    assert _start("train", alone).wait(DEADLINE_S) == 0, (folder / "log").read_text()
    rng = random.Random(seed)
    after = tuple(_kill_at(folder, killed, at, rng) for at in sorted(rng.sample(range(3, STEPS), kills)))
    assert _start("resume", folder / "killed").wait(DEADLINE_S) == 0, (folder / "log").read_text()
    found = audit_run(folder / "killed")
    return Compared(
        after,
        dict(found.returned),
        found.violations,
        (_files(folder / "alone"), _files(folder / "killed")),
    )


def _config(folder: Path, name: str) -> Path:
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
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _start(command: str, argument: Path) -> "subprocess.Popen[bytes]":
    log = (argument.parent / "log").open("ab")
    with log:
        return subprocess.Popen(
            [sys.executable, "-c", "from deploy.cli import main; main()", command, str(argument)],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )


def _kill_at(folder: Path, config: Path, step: int, rng: random.Random) -> int:
    """Starts or resumes the run, kills all its processes at a random moment after a step; how many steps were done."""
    run = folder / "killed"
    driver = _start("resume", run) if run.exists() else _start("train", config)
    deadline = time.monotonic() + DEADLINE_S
    while _steps(run) < step or not _has_checkpoint(run):
        if driver.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the run did not reach step {step}:\n{(folder / 'log').read_text()}")
        time.sleep(0.02)
    time.sleep(rng.random() * 0.5)
    assert driver.poll() is None, "the run ended before it was killed"
    processes = [driver.pid, *_descendants(driver.pid)]
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):  # it ended with one that was killed before it
            os.kill(pid, signal.SIGKILL)
    driver.wait()
    done = _steps(run)
    assert audit_run(run).violations == ()
    return done


def _steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        return 0
    lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return max((r["step"] for r in map(json.loads, lines) if r["kind"] == "step"), default=0)


def _has_checkpoint(run: Path) -> bool:
    db = sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True)
    try:
        return bool(db.execute("SELECT COUNT(*) FROM checkpoints").fetchone()[0])
    finally:
        db.close()


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


def _files(run: Path) -> dict[str, str]:
    """Weights, optimizer and tokenizer; state.json names the policy version, which is never used twice."""
    last = run / "checkpoints" / f"step-{STEPS:06d}"
    return {
        str(path.relative_to(last)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(last.rglob("*"))
        if path.is_file() and path.name != "state.json"
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distrl-sigkill-") as folder:
        found = compare(Path(folder), arguments.kills, arguments.seed)
    alone, killed = found.files
    equal = alone == killed and len(alone) > 3
    print(f"{arguments.kills} SIGKILLs, after steps {found.killed_after} of {STEPS}; went back: {found.returned}")
    for name in alone:
        print(f"{'equal    ' if alone[name] == killed.get(name) else 'DIFFERENT'} {alone[name]} {name}")
    for violation in found.violations:
        print(f"VIOLATION {violation.rule}: {violation.detail}")
    return int(not equal or bool(found.violations))


if __name__ == "__main__":
    sys.exit(main())
