"""How quick the live page is on a run of many rollouts.

python -m benchmarks.rollouts --rollouts 100000

Makes a run directory with the classes that write real ones, then asks the server's own pages. JSON lines: seconds of
the first reading of the journal, and of each page after it (the median of some askings).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pyarrow as pa

from deploy.run_dir import RunDir, create_run_dir
from deploy.ui.server import Site
from distrl.config import make_config
from distrl.ledger import Ledger
from distrl.messages import JournalReceipt
from distrl.schema import SCHEMAS, Stage

GROUP, TICKETS_PER_FILE, TOKENS = 16, 32, 200


def make(folder: Path, rollouts: int) -> RunDir:
    """A run whose responses have some 800 characters."""
    values = {"run": {"dir": str(folder), "name": "large"}, "model": {"path": str(folder / "none")}}
    run_dir = create_run_dir(make_config({**values, "data": {"source": "sort_digits"}}))
    run_dir.journal.mkdir()
    ledger = Ledger(run_dir.ledger)
    ledger.mark_published(ledger.allocate_version(None, 0), "sha")
    tickets = rollouts // GROUP
    for first in range(0, tickets, TICKETS_PER_FILE):
        numbers = [ledger.issue(lambda i: f"prompt-{i}")[0] for _ in range(min(TICKETS_PER_FILE, tickets - first))]
        path = run_dir.journal / f"{first:09d}.arrow"
        batch = pa.RecordBatch.from_pylist(
            [_row(t, g) for t in numbers for g in range(GROUP)], schema=SCHEMAS[Stage.JOURNAL]
        )
        with pa.ipc.new_file(path, batch.schema) as writer:
            writer.write_batch(batch)
        receipt = JournalReceipt(str(path), "sha", batch.num_rows, path.stat().st_size)
        for ticket in numbers:
            ledger.mark_generated(ticket, versions=[0], rollouts=GROUP, response_tokens=GROUP * TOKENS)
            ledger.mark_ready(ticket, journal_file=receipt, reward_mean=0.5)
    ledger.close()
    return run_dir


def _row(ticket: int, group: int) -> dict[str, object]:
    text = f"answer {ticket}.{group} " + "because it is so " * 48
    reward = float((ticket + group) % 2)
    row: dict[str, object] = dict.fromkeys(SCHEMAS[Stage.JOURNAL].names, 0)
    row |= {
        "rollout_id": f"p{ticket}.0.{group}",
        "ticket_id": ticket,
        "prompt_id": f"prompt-{ticket}",
        "role": "policy",
    }
    row |= {"group_index": group, "prompt_token_ids": [1] * 20, "response_token_ids": [2] * TOKENS, "text": text}
    row |= {"behavior_logps": [-0.5] * TOKENS, "policy_versions": [0] * TOKENS, "loss_mask": [True] * TOKENS}
    row |= {"ref_logps": [-0.6] * TOKENS, "finish_reason": "stop", "engine": "fake", "grader": "exact"}
    row |= {"turn_rewards": [], "turn_ends": [], "v_star": None, "preference": None}
    return row | {"reward": reward, "verdict": "correct" if reward else "wrong", "reason": None, "components": []}


def seconds(call: Callable[[], object], times: int = 1) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return median(taken)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rollouts", type=int, default=100_000)
    size = parser.parse_args().rollouts
    with tempfile.TemporaryDirectory() as folder:
        run_dir = make(Path(folder), size)
        site = Site(run_dir, clock=lambda: 0.0)
        print(json.dumps({"page": "first list", "rollouts": size, "s": seconds(lambda: site.page("/rollouts", {}))}))
        for name, path, query in (
            ("list", "/rollouts", {}),
            ("last page", "/rollouts", {"page": str(size // 50)}),
            ("search", "/rollouts", {"search": f"answer {size // 32}.3 "}),
            ("filter", "/rollouts", {"verdict": "wrong", "reward_max": "0.5"}),
            ("rollout", f"/rollout/p{size // 32}.0.3", {}),
        ):
            taken = seconds(lambda p=path, q=query: site.page(p, q), times=5)  # type: ignore[misc]
            print(json.dumps({"page": name, "rollouts": size, "s": taken}), flush=True)
        print(json.dumps({"page": "overview", "rollouts": size, "s": seconds(lambda: site.page("/", {}))}))
        site.close()


if __name__ == "__main__":
    main()
