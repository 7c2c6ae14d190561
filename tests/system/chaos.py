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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.audit import audit_run
from distrl.audit import Audit
from distrl.ledger_reader import LedgerReader
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer

ROLES = ("generation", "grading", "reference", "policy-store", "journal", "coordinator", "learner", "driver")
SETTLE_S = 3.0
"""Objects of a dead process stay readable for a while; nothing is judged before."""
LONGEST_PAUSE_S = 6.0
WAIT_S = 300.0
TICKETS_PER_STEP = 6
_SAMPLED = "SELECT generated_s FROM tickets WHERE generated_s IS NOT NULL ORDER BY generated_s DESC LIMIT 100"


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
                    "train": {"steps": steps, "tickets_per_step": TICKETS_PER_STEP, "checkpoint_every_steps": 3},
                    "evaluation": {"problems": 16, "every_steps": 0, "problems_during": 16},
                    "limits": {"restarts": 1000, "call_attempts": 6},
                }
            )
        )
        self.process = self._start("train", str(self.config))

    def _start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        call = "import sys; from deploy.cli import main; sys.argv[0] = 'distrl'; main()"
        return subprocess.Popen([sys.executable, "-c", call, *arguments])

    def resume(self, settle_s: float = SETTLE_S) -> None:
        self.process.wait()
        time.sleep(settle_s)
        self.process = self._start("resume", str(self.path))

    def under_way(self) -> int:
        """Tickets that are issued and neither committed nor dropped."""
        if not (self.path / "ledger.sqlite").exists():
            return 0
        with LedgerReader(self.path / "ledger.sqlite") as ledger:
            counts = ledger.counts()
        return sum(counts[state] for state in ("issued", "generated", "ready", "trained"))

    def sampled(self) -> list[float]:
        """When tickets were sampled, in seconds since the epoch."""
        if not (self.path / "ledger.sqlite").exists():
            return []
        with LedgerReader(self.path / "ledger.sqlite") as ledger:
            return [row["generated_s"] for row in ledger.rows(_SAMPLED)]

    def stepped(self) -> list[float]:
        """When optimizer steps ended, in seconds since the epoch."""
        metrics = self.path / "metrics.jsonl"
        text = metrics.read_text() if metrics.exists() else ""
        # The last line may be half written.
        return [json.loads(line)["time_s"] for line in text.split("\n")[:-1] if '"kind": "step"' in line]

    def rows(self) -> list[dict[str, Any]]:
        table = self.path / "processes.json"
        found: list[dict[str, Any]] = json.loads(table.read_text())["processes"] if table.exists() else []
        return found

    def wait_for(self, role: str) -> dict[str, Any]:
        """The row of a process of this role, as soon as one is up in the driver that runs now."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the run ended with status {self.process.returncode} before {role} was up")
            rows = self.rows()
            own = any(r["name"] == "driver" and r["pid"] == self.process.pid for r in rows)
            for row in rows:
                if own and row["stage"] == role and row["state"] == "up" and "pid" in row:
                    return row
            time.sleep(0.1)
        raise AssertionError(f"no {role} was up within {WAIT_S:g} s")

    def end(self) -> None:
        """Ends the driver, and with it everything that it started."""
        self.process.kill()
        self.process.wait()

    def kill(self, role: str, rng: random.Random) -> dict[str, Any]:
        """Kills a process of this role while tickets are under way; what was killed, when, and how many these were."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the run ended with status {self.process.returncode} before {role} was killed")
            own = [r for r in self.rows() if r["name"] == "driver" and r["pid"] == self.process.pid]
            up = [r for r in self.rows() if r["stage"] == role and r["state"] == "up" and "pid" in r]
            if own and up and (under_way := self.under_way()) > 0:
                row = rng.choice(up)
                try:
                    os.kill(row["pid"], signal.SIGKILL)
                except ProcessLookupError:
                    continue  # the table is older than its death
                return {"killed": row["name"], "pid": row["pid"], "under_way": under_way, "time_s": time.time()}
            time.sleep(0.1)
        raise AssertionError(f"no {role} was up with tickets under way within {WAIT_S:g} s")


def schedule(kills: int, rng: random.Random) -> list[str]:
    """Each role once in turn, twice more and the rest at random."""
    again = list(ROLES) * 2
    rng.shuffle(again)
    return [*ROLES, *again, *(rng.choice(ROLES) for _ in range(kills))][:kills]


def play(order: Sequence[str], rng: random.Random, folder: Path, steps: int) -> Audit:
    """Kills a process of each role in this order during a run of so many steps, and judges the run."""
    run = Run(folder, steps)
    try:
        for role in order:
            print(json.dumps(run.kill(role, rng)), flush=True)
            if role == "driver":
                run.resume()
            time.sleep(rng.uniform(0.5, LONGEST_PAUSE_S))
        status = run.process.wait(timeout=900)
        assert status == 0, f"the run ended with status {status}"
    finally:
        run.end()
    found = audit_run(run.path)
    assert found.violations == (), found.violations
    assert found.committed_steps == run.steps
    assert found.tickets["committed"] == TICKETS_PER_STEP * run.steps, found.tickets
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    order = schedule(arguments.kills, rng)
    with tempfile.TemporaryDirectory() as folder:
        found = play(order, rng, Path(folder), steps=15 * arguments.kills)
    kills = {role: order.count(role) for role in ROLES}
    print(json.dumps({"seed": arguments.seed, "kills": kills, "tickets": found.tickets, "drops": found.drops}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
