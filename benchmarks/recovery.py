"""How long is a run held up by the death of one of its processes?

    python -m benchmarks.recovery [--repetitions 3] [--roles coordinator learner]

Kills one process of each role of a small run with SIGKILL, one after the other, each when the run has recovered from
the one before. `rollout_s`: from the kill to the first ticket that is sampled after it; `step_s`: to the end of the
next optimizer step; `replaced_s`: until the run's table of processes shows another one up in its place. A driver is
started again (`distrl resume`) at once; its times include the start of everything. Where others of the same role live,
the run goes on beside the replacement.

Prints a JSON line per kill and one per role with the medians.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.system.chaos import ROLES, WAIT_S, Run

QUIET_S = 3.0
"""Seconds between a recovery and the next kill."""
POLL_S = 0.05


def first_after(times: list[float], moment_s: float) -> float | None:
    """Seconds from a moment to the first of these times after it; all since the epoch."""
    later = [t - moment_s for t in times if t > moment_s]
    return min(later) if later else None


def replaced(run: Run, role: str, dead: dict[str, Any], moment_s: float) -> float | None:
    """Seconds from the kill until now, where as many are up as before and none of them is the dead one."""
    up = [row["pid"] for row in run.rows() if row["stage"] == role and row["state"] == "up" and "pid" in row]
    wanted = 2 if role in ("generation", "grading") else 1
    return time.time() - moment_s if len(up) == wanted and dead["pid"] not in up else None


def measure(run: Run, role: str, rng: random.Random) -> dict[str, float]:
    """Kills one process of a role and waits until the run has recovered."""
    dead = run.kill(role, rng)
    killed_s = dead["time_s"]
    if role == "driver":
        run.resume(settle_s=0.0)
    found: dict[str, float | None] = {"rollout_s": None, "step_s": None, "replaced_s": None}
    deadline = time.monotonic() + WAIT_S
    while None in found.values():
        if time.monotonic() > deadline or run.process.poll() is not None:
            raise RuntimeError(f"the run must recover from the death of {role} within {WAIT_S:g} s, it has {found}")
        time.sleep(POLL_S)
        if found["rollout_s"] is None:
            found["rollout_s"] = first_after(run.sampled(), killed_s)
        if found["step_s"] is None:
            found["step_s"] = first_after(run.stepped(), killed_s)
        if found["replaced_s"] is None:
            found["replaced_s"] = replaced(run, role, dead, killed_s)
    return {key: round(seconds, 2) for key, seconds in found.items() if seconds is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=list(ROLES))
    arguments = parser.parse_args()
    rng = random.Random(0)
    seen: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), steps=1_000_000)
        try:
            while not run.stepped():
                if run.process.poll() is not None:
                    raise RuntimeError(f"the run ended with status {run.process.returncode} before its first step")
                time.sleep(POLL_S)
            for _ in range(arguments.repetitions):
                for role in arguments.roles:
                    time.sleep(QUIET_S)
                    times = measure(run, role, rng)
                    seen[role].append(times)
                    print(json.dumps({"role": role, **times}), flush=True)
        finally:
            run.end()
    for role, rows in seen.items():
        medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(json.dumps({"role": role, "kills": len(rows), "median": medians}))


if __name__ == "__main__":
    main()
