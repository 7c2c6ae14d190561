"""What a run came to: the numbers of `summary.json`."""

import json
import sqlite3
import statistics
from typing import Any

from deploy.run_dir import RunDir


def summarize(run_dir: RunDir, snapshot: dict[str, Any], state: str, wall_s: float) -> dict[str, Any]:
    """Reads the ledger and the metrics of a finished run.

    Args:
        snapshot: the coordinator's last one.
        state: how the run ended, finished or stopped.
        wall_s: seconds from the start of this command to its end.
    Returns:
        state; heldout_accuracy_before and _after with standard errors and problems, null where that evaluation was
        not made; steps; rollouts trained; wall_s of this command;
        learner_wait_fraction, the share of the learner's time between its first batch and its last step that it
        waited for batches; learner_waits_s by the stage that it waited for, the wait for the first batch included;
        generation_held_s, in which generation was idle because the learner had to catch up; max_observed_staleness;
        weight_updates, counted per generation actor, with the milliseconds that sampling paused for one and the bytes
        that moved to the actors, and how many came from the store although the learner had offered them; tickets
        (issued, trained, dropped by reason).
    """
    with sqlite3.connect(run_dir.ledger) as db:
        evaluations = {
            name: (accuracy, error, responses)
            for name, accuracy, error, responses in db.execute(
                "SELECT name, accuracy, standard_error, responses FROM evaluations ORDER BY evaluation"
            )
        }
        trained, rollouts = db.execute(
            "SELECT COUNT(*), COALESCE(SUM(rollouts), 0) FROM tickets WHERE trained_step IS NOT NULL"
        ).fetchone()
    with run_dir.metrics.open() as file:
        records = [json.loads(line) for line in file]
    steps = [r for r in records if r["kind"] == "step"]
    loads = [r for r in records if r["kind"] == "load"]
    # The first step of a process waits for the start of everything; it is the one with nothing published before it.
    waited = sum(r["wait_s"] for r in steps if r["last_publish_s"] > 0)
    busy = sum(r["train_s"] + r["last_publish_s"] for r in steps)
    counts = snapshot["tickets"]
    return {
        "state": state,
        **_heldout("before", evaluations.get("before")),
        **_heldout("after", evaluations.get("after")),
        "steps": snapshot["step"],
        "rollouts": rollouts,
        "wall_s": round(wall_s, 3),
        "learner_wait_fraction": waited / (waited + busy) if steps else 0.0,
        "learner_waits_s": snapshot["learner_waits_s"],
        "generation_held_s": snapshot["generation_held_s"],
        "max_observed_staleness": snapshot["max_staleness"],
        "weight_updates": _weight_updates(loads),
        "tickets": {
            "issued": sum(counts.values()),
            "trained": trained,
            "dropped": snapshot["drops"],
        },
    }


def _weight_updates(loads: list[dict[str, Any]]) -> dict[str, Any]:
    pauses = [1000 * r["pause_s"] for r in loads]
    return {
        "loads": len(loads),
        "pause_ms_median": round(statistics.median(pauses), 3) if pauses else None,
        "pause_ms_max": round(max(pauses), 3) if pauses else None,
        # Records of an earlier format have no bytes.
        "moved_bytes": sum(r.get("moved_bytes", 0) for r in loads),
        "fallbacks": sum(r.get("fallback") is not None for r in loads),
    }


def _heldout(name: str, evaluation: tuple[float, float, int] | None) -> dict[str, Any]:
    accuracy, error, problems = evaluation or (None, None, None)
    return {
        f"heldout_accuracy_{name}": accuracy,
        f"heldout_accuracy_{name}_standard_error": error,
        f"heldout_problems_{name}": problems,
    }
