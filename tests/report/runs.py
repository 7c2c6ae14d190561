"""Small run directories for tests of the report, written by the classes that write real ones."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.journal import Journal
from actors.recorder import Recorder
from deploy.run_dir import RunDir, create_run_dir, write_json
from distrl.config import make_config
from distrl.ledger import Ledger
from distrl.messages import LoadReceipt, StepReport
from distrl.schema import Stage, record_batch
from distrl.tickets import DropReason
from tests.builders import run

BEGAN_S = 1000.0
STEP_S = 10.0
"""Seconds from one step's record to the next."""
GROUP = 2
TICKETS_PER_STEP = 3
ATTACK = "</script><script>alert('x')</script> & \u202egnp.exe \x00"
"""What a model may write: markup, a right-to-left override, a NUL."""
SUMMARY = {
    "state": "finished",
    "wall_s": 77.0,
    "learner_wait_fraction": 0.2,
    "learner_waits_s": {"generation": 1.5, "grading": 0.25},
    "generation_held_s": 4.0,
}


class Clock:
    """Tells the time that the test sets."""

    def __init__(self) -> None:
        self.now = BEGAN_S

    def __call__(self) -> float:
        return self.now


@dataclass
class Drawn:
    """One ticket as the test knows it: what the report must say again."""

    ticket_id: int
    step: int
    rewards: tuple[float, ...]
    tokens: tuple[int, ...]
    staleness: int
    version: int


@dataclass
class MadeRun:
    """A run directory with the numbers that went into it."""

    dir: RunDir
    drawn: list[Drawn] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)


def empty_run(folder: Path, **overrides: object) -> MadeRun:
    """A run directory that has its config and nothing else."""
    values = {
        "run": {"dir": str(folder), "name": "made"},
        "model": {"path": str(folder / "model")},
        "data": {"source": "sort_digits", "heldout_size": 8},
        "rollout": {"group_size": GROUP, "max_new_tokens": 8},
        "train": {"tickets_per_step": TICKETS_PER_STEP, "steps": 4, "max_staleness": 1},
    }
    config = make_config(values, [f"{key}={value}" for key, value in overrides.items()])
    return MadeRun(create_run_dir(config))


def make_run(
    folder: Path, steps: int = 4, *, metrics: Sequence[dict[str, float]] = (), attack: bool = False
) -> MadeRun:
    """A run of some steps that has not finished: TICKETS_PER_STEP tickets trained in each, and three dropped.

    Args:
        metrics: of each step beside the usual ones.
        attack: every response, reason and drop detail is ATTACK.
    """
    made, clock = empty_run(folder), Clock()
    ledger, recorder = Ledger(made.dir.ledger, clock), Recorder(made.dir.metrics, clock)
    ledger.mark_published(ledger.allocate_version(None, 0), "sha-0")

    async def go() -> None:
        journal = Journal(made.dir.journal, clock)
        _evaluate(made, ledger, recorder, "before", 0)
        for step in range(1, steps + 1):
            clock.now = BEGAN_S + STEP_S * step
            staleness = {}
            for _ in range(TICKETS_PER_STEP):
                drawn = await _ready_ticket(made, ledger, journal, clock, step, attack=attack)
                staleness[drawn.ticket_id] = drawn.staleness
            _step(made, ledger, recorder, clock, step, staleness, metrics[step - 1] if metrics else {})
        _drops(ledger, ATTACK if attack else "it broke")
        if steps:
            _evaluate(made, ledger, recorder, "after", steps)

    run(go())
    recorder.event("failed_call", "ticket 3 in grading: it broke")
    recorder.close()
    ledger.close()
    return made


def copy_run(made: MadeRun, folder: Path) -> MadeRun:
    """A copy that a test may change."""
    path = folder / made.dir.path.name
    shutil.copytree(made.dir.path, path)
    return replace(made, dir=RunDir(path))


def finish(made: MadeRun) -> None:
    write_json(made.dir.summary, SUMMARY)


def fail(made: MadeRun, cause: str) -> None:
    recorder = Recorder(made.dir.metrics, lambda: BEGAN_S + 500)
    recorder.event("failed", cause)
    recorder.close()


async def _ready_ticket(
    made: MadeRun, ledger: Ledger, journal: Journal, clock: Clock, step: int, *, attack: bool
) -> Drawn:
    ends_s = clock.now
    version = max(0, step - 2)  # one step behind, but for the first step
    clock.now = ends_s - 6
    ticket_id, prompt_id, _ = ledger.issue(lambda i: f"prompt-{i}")
    rewards = tuple(float((ticket_id + g) % 2 or ticket_id % 3 == 0) for g in range(GROUP))
    tokens = tuple(2 + (ticket_id + g) % 3 for g in range(GROUP))
    drawn = Drawn(ticket_id, step, rewards, tokens, step - 1 - version, version)
    made.drawn.append(drawn)
    clock.now = ends_s - 4
    ledger.mark_generated(ticket_id, versions=[version], rollouts=GROUP, response_tokens=sum(tokens))
    generation, grading, reference = _batches(drawn, prompt_id, ends_s, ATTACK if attack else None)
    receipt = await journal.append(generation, grading, reference)
    clock.now = ends_s - 2
    ledger.mark_ready(ticket_id, journal_file=receipt, reward_mean=sum(rewards) / GROUP)
    clock.now = ends_s
    return drawn


def _batches(
    drawn: Drawn, prompt_id: str, ends_s: float, attack: str | None
) -> tuple[pa.RecordBatch, pa.RecordBatch, pa.RecordBatch]:
    ids = [f"p{drawn.ticket_id}.0.{g}" for g in range(GROUP)]
    same: dict[str, Any] = {"role": "policy", "redraw": 0, "finish_reason": "stop", "temperature": 1.0, "top_p": 1.0}
    same |= {"v_star": None}
    same |= {"top_k": 0, "max_new_tokens": 8, "engine": "generation-0", "prompt_id": prompt_id}
    same |= {"generation_started_s": ends_s - 5.5, "generation_finished_s": ends_s - 4, "ticket_id": drawn.ticket_id}
    generation = {name: [value] * GROUP for name, value in same.items()} | {
        "rollout_id": ids,
        "group_index": list(range(GROUP)),
        "prompt_token_ids": [[7, drawn.ticket_id]] * GROUP,
        "response_token_ids": [[1] * n for n in drawn.tokens],
        "behavior_logps": [[-0.5] * n for n in drawn.tokens],
        "policy_versions": [[drawn.version] * n for n in drawn.tokens],
        "loss_mask": [[True] * n for n in drawn.tokens],
        "turn_rewards": [[]] * GROUP,
        "turn_ends": [[]] * GROUP,
        "text": [attack or f"answer {i}" for i in ids],
    }
    grading = {
        "rollout_id": ids,
        "reward": list(drawn.rewards),
        "verdict": ["correct" if r else "wrong" for r in drawn.rewards],
        "reason": [attack] * GROUP,
        "preference": [None] * GROUP,
        "components": [[]] * GROUP,
        "grader": ["exact"] * GROUP,
        "grading_started_s": [ends_s - 3.5] * GROUP,
        "grading_finished_s": [ends_s - 3.25] * GROUP,
    }
    reference = {
        "rollout_id": ids,
        "ref_logps": [[-0.5] * n for n in drawn.tokens],
        "ref_version": [0] * GROUP,
        "reference_started_s": [ends_s - 3.0] * GROUP,
        "reference_finished_s": [ends_s - 2.5] * GROUP,
    }
    return (
        record_batch(Stage.GENERATION, generation),
        record_batch(Stage.GRADING, grading),
        record_batch(Stage.REFERENCE, reference),
    )


def _step(
    made: MadeRun,
    ledger: Ledger,
    recorder: Recorder,
    clock: Clock,
    step: int,
    staleness: dict[int, int],
    metrics: dict[str, float],
) -> None:
    usual = {"loss": 0.5 - step / 8, "kl_behavior": step / 64, "grad_norm": 2.0 + step, "ratio_mean": 1.0}
    times = (1.0 + step / 4, 5.0, 0.0 if step == 1 else 0.25)
    # The third waits for the publication of the second.
    report = StepReport(step, *times, {**usual, **metrics}, held_s=0.125 if step == 3 else 0.0)
    made.reports.append(report)
    drawn = [d for d in made.drawn if d.ticket_id in staleness]
    version = ledger.mark_trained(step, staleness, parent=step - 1)
    recorder.step(
        report,
        [sum(d.rewards) / GROUP for d in drawn],
        list(staleness.values()),
        sum(sum(d.tokens) for d in drawn),
    )
    clock.now += 0.25
    ledger.mark_published(version, f"sha-{version}")
    clock.now += 0.25
    recorder.load(
        "generation-0", LoadReceipt(version=version, fetch_s=0.125, pause_s=0.0625, sequences_in_flight=1), "policy"
    )


def _evaluate(made: MadeRun, ledger: Ledger, recorder: Recorder, name: str, step: int) -> None:
    accuracy = 0.25 + step / 16
    row: dict[str, object] = {"name": name, "step": step, "oldest_version": step, "newest_version": step}
    row |= {"problems": 8, "responses": 8, "failed": 0, "accuracy": accuracy, "standard_error": 0.125}
    row |= {"reward_mean": accuracy}
    ledger.record_evaluation(row)
    recorder.evaluation(row)
    made.accuracies.append((step, accuracy))


def _drops(ledger: Ledger, detail: str) -> None:
    """One ticket is dropped before it was sampled, two after; their responses are long."""
    for reason, tokens in (
        (DropReason.GENERATION_FAILED, None),
        (DropReason.GRADING_FAILED, 14),
        (DropReason.GRADING_FAILED, 16),
    ):
        ticket_id, _, _ = ledger.issue(lambda i: f"prompt-{i}")
        if tokens is not None:
            ledger.mark_generated(ticket_id, versions=[0], rollouts=GROUP, response_tokens=tokens)
        ledger.drop(ticket_id, reason, detail)
