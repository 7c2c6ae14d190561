"""Kills processes of a real run with SIGKILL, one after the other, and audits what is left.

python -m tests.system.chaos --kills 28      # every role in turn, then at random
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from deploy.audit import audit_run
from distrl.ledger_reader import LedgerReader
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer

ROLES = ("generation", "grading", "reference", "policy-store", "journal", "coordinator", "learner", "driver")
SETTLE_S = 3.0
"""Objects of a dead process stay readable for a while; nothing is judged before."""
WAIT_S = 180.0


class Run:
    """The `distrl` command as a process of its own, started again when it was killed."""

    def __init__(self, folder: Path, steps: int) -> None:
        model = folder / "model"
        size = TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64)
        make_tiny_model(model, character_tokenizer(ALPHABET), seed=0, architecture=size)
        self.path = folder / "run"
        self.steps = steps
        self.config = folder / "config.yaml"
        self.config.write_text(
            json.dumps(
                {
                    "run": {"dir": str(folder), "name": "run"},
                    "model": {"path": str(model)},
                    "data": {"source": "sort_digits", "heldout_size": 32, "options": {"digits": 4}},
                    "rollout": {"group_size": 4, "max_new_tokens": 6},
                    "generation": {"actors": 2, "slots": 16},
                    "grading": {"actors": 2},
                    "objective": {"options": {"kl_coefficient": 0.01}},
                    "train": {"steps": steps, "tickets_per_step": 6, "checkpoint_every_steps": 3},
                    "evaluation": {"problems": 16, "every_steps": 0, "problems_during": 16},
                    "limits": {"restarts": 1000, "call_attempts": 6},
                }
            )
        )
        self.process = self._start("train", str(self.config))

    def _start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        call = "import sys; from deploy.cli import main; sys.argv[0] = 'distrl'; main()"
        return subprocess.Popen([sys.executable, "-c", call, *arguments])

    def resume(self) -> None:
        self.process.wait()
        time.sleep(SETTLE_S)
        self.process = self._start("resume", str(self.path))

    def under_way(self) -> int:
        """Tickets that are issued and neither committed nor dropped."""
        if not (self.path / "ledger.sqlite").exists():
            return 0
        with LedgerReader(self.path / "ledger.sqlite") as ledger:
            counts = ledger.counts()
        return sum(counts[state] for state in ("issued", "generated", "ready", "trained"))

    def rows(self) -> list[dict[str, Any]]:
        table = self.path / "processes.json"
        found: list[dict[str, Any]] = json.loads(table.read_text())["processes"] if table.exists() else []
        return found

    def kill(self, role: str, rng: random.Random) -> int:
        """Kills a process of this role while tickets are under way; its id."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the run ended with status {self.process.returncode} before {role} was killed")
            own = [r for r in self.rows() if r["name"] == "driver" and r["pid"] == self.process.pid]
            up = [r for r in self.rows() if r["stage"] == role and r["state"] == "up" and "pid" in r]
            if own and up and self.under_way() > 0:
                pid = int(rng.choice(up)["pid"])
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                return pid
            time.sleep(0.1)
        raise AssertionError(f"no {role} was up with tickets under way within {WAIT_S:g} s")


def play(kills: int, seed: int, folder: Path) -> dict[str, int]:
    """Kills every role in turn until each had its share, then at random, and judges the run; kills by role."""
    rng = random.Random(seed)
    order = list(ROLES) * min(3, kills // len(ROLES))
    order += [rng.choice(ROLES) for _ in range(kills - len(order))]
    run = Run(folder, steps=10 * kills)
    done = dict.fromkeys(ROLES, 0)
    try:
        for role in order:
            pid = run.kill(role, rng)
            done[role] += 1
            print(json.dumps({"killed": role, "pid": pid, "under_way": run.under_way()}), flush=True)
            if role == "driver":
                run.resume()
            time.sleep(SETTLE_S)
        status = run.process.wait(timeout=600)
        assert status == 0, f"the run ended with status {status}"
    finally:
        run.process.kill()
    found = audit_run(run.path)
    assert found.violations == (), found.violations
    assert found.committed_steps == run.steps
    assert found.tickets["committed"] == 6 * run.steps, found.tickets
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"kills": play(arguments.kills, arguments.seed, Path(folder))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
