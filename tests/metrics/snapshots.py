"""Snapshots of a coordinator as the driver gets them, with numbers that a test can follow."""

from typing import Any

from actors.recorder import Recorder
from distrl.messages import LoadReceipt, StepReport

METRICS = {"loss": 0.5, "ess": 0.75, "ratio_mean": 1.0, "ratio_max": 3.0, "kl_behavior": 0.01, "kl_reference": 0.02}
METRICS |= {"logp_mismatch_mean": 0.001, "logp_mismatch_max": 0.01, "logp_mismatch_tokens": 30.0}
METRICS |= {"logp_mismatch_mean.generation-0": 0.001, "logp_mismatch_max.generation-0": 0.01}
METRICS |= {"ratio_p01": 0.5, "ratio_p50": 1.0, "ratio_p99": 2.0}
METRICS |= {"entropy": 1.5, "grad_norm": 2.0, "learning_rate": 1e-4, "at_bound_policy": 0.125}


def snapshot(step: int = 0, **changes: Any) -> dict[str, Any]:
    """Of a run that has done `step` steps of two tickets with two rollouts each."""
    rollouts = 4 * step
    return {
        "records": [],
        "step": step,
        "stages": {"generation": 3, "ready": 1},
        "granted": 2,
        "rollouts": dict.fromkeys(("generation", "grading", "journal"), rollouts),
        "tickets": {"issued": 3, "ready": 1, "committed": 2 * step, "dropped": 1},
        "drops": {"grading_failed": 1},
        "learner_waits_s": {"generation": 0.5 * step, "issue": 0.25},
        "generation_held_s": 4.0,
        "busy": {"generation": 12, "grading": 1},
        "members": [
            {"stage": "generation", "name": "generation-0", "capacity": 16, "busy": 12, "version": step, "step": step},
            {"stage": "generation", "name": "generation-1", "capacity": 16, "busy": 0, "version": 1, "step": 1},
            {"stage": "grading", "name": "grading-0", "capacity": 8, "busy": 1, "version": 0, "step": 0},
        ],
        "truncated": step,
        "generated_tokens": 10 * rollouts,
        "retries": {"generation": 0, "grading": 2 * step},
        "restarts": {"generation": 1, "learner": 0},
        **changes,
    }


def record(recorder: Recorder, step: int, **metrics: float) -> None:
    """What the coordinator records of one step: two tickets, one of them a step old, and a pull of its weights."""
    report = StepReport(step, wait_s=1.0, train_s=6.0, last_publish_s=1.0, metrics={**METRICS, **metrics})
    recorder.step(report, rewards=[0.25, 0.75], staleness=[0, 1], tokens=40)
    recorder.published(step, step, publish_s=0.5)
    recorder.load(
        "generation-0", LoadReceipt(step, fetch_s=0.2, pause_s=0.02, sequences_in_flight=3, moved_bytes=500), "policy"
    )
