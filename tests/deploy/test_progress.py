"""What a run shows, on a terminal and elsewhere."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from deploy.progress import Terminal

SUMMARY = {
    "heldout_accuracy_before": 0.25,
    "heldout_accuracy_before_standard_error": 0.0135,
    "heldout_accuracy_after": 0.7,
    "heldout_accuracy_after_standard_error": 0.0143,
    "heldout_problems_before": 1024,
    "heldout_problems_after": 1024,
    "state": "finished",
    "steps": 20,
    "rollouts": 640,
    "wall_s": 61.4,
    "max_observed_staleness": 2,
    "learner_wait_fraction": 0.125,
}


def snapshot(*records: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "records": list(records),
        "rollouts": {"generation": 64, "grading": 32},
        "learner_waiting": False,
        "generation_held": False,
        "oldest": None,
        **changes,
    }


def step(number: int) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": number,
        "reward_mean": 0.5,
        "staleness_mean": 1.25,
        "staleness_max": 2,
        "train_s": 1.5,
        "wait_s": 0.25,
    }


EVALUATION = {"kind": "evaluation", "accuracy": 0.4, "standard_error": 0.03, "responses": 256, "failed": 0, "step": 10}


def shown(terminal: bool, *snapshots: dict[str, Any]) -> str:
    out = io.StringIO()
    progress = Terminal(Console(file=out, force_terminal=terminal, width=100), steps=20, name="mine")
    with progress:
        progress.phase("starting Ray")
        for one in snapshots:
            progress.update(one)
        progress.finish(SUMMARY, Path("runs/mine"))
    return out.getvalue()


def test_plain_lines_tell_the_first_step_each_tenth_and_each_evaluation() -> None:
    text = shown(False, snapshot(step(1)), snapshot(step(3)), snapshot(step(4), EVALUATION, learner_waiting=True))
    lines = [line.split(" s  ", 1)[-1] for line in text.splitlines()]
    assert lines == [
        "starting Ray",
        "step 1 of 20: reward 0.500, staleness 1.25 (max 2), step 1.50 s, waited 0.25 s; nobody waits",
        "step 4 of 20: reward 0.500, staleness 1.25 (max 2), step 1.50 s, waited 0.25 s; the learner waits for new "
        "tickets",
        "held-out accuracy 0.400 ± 0.030 on 256 problems at step 10",
        "",
        "Held-out accuracy on 1024 problems: 0.250 ± 0.013 before, 0.700 ± 0.014 after",
        "640 rollouts and 20 steps in 61 s; largest staleness 2; the learner waited 12% of its time",
        "All of it: runs/mine/summary.json",
    ]


def test_a_terminal_shows_step_reward_staleness_rates_and_who_waits() -> None:
    text = shown(
        True,
        snapshot(step(4), EVALUATION, learner_waiting=True, oldest={"stage": "grading", "ticket": 3, "since_s": 1}),
    )
    for part in ("4 of 20", "0.500  (mean of 5 steps)", "mean 1.25, max 2 steps", "the learner waits for grading"):
        assert part in text
    assert "\x1b[" in text


def test_failures_are_shown_at_once() -> None:
    record = {"kind": "dropped", "message": "grading_failed: the grader is broken"}
    assert "dropped: grading_failed: the grader is broken" in shown(False, snapshot(record))
