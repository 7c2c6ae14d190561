"""What a run waits for: the stage, the process, its stack, and what to do."""

import time
from dataclasses import dataclass
from typing import Any

from deploy.doctor.processes import Process, of_run, stack
from deploy.live import STALE_S, read_live
from deploy.run_dir import RunDir
from deploy.run_state import RunState, read_state
from deploy.stall import where

REMEDIES = {
    "generation": "if its stack is inside the engine, it samples: raise generation.timeout_s or "
    "lower rollout.max_new_tokens; else end the process, its tickets are sampled again or dropped with their reason",
    "grading": "the stack shows the grader's own code: give it a timeout, or lower grading.timeout_s; end the process "
    "to have its tickets graded again",
    "reference": "lower reference.tickets_per_call, or add reference.actors",
    "replay": "look at the disk or the storage that holds the recording of replay.journal: a network file system that "
    "does not answer; limits.journal_timeout_s bounds a read",
    "journal": "look at the disk of the run: full, read-only, or a network file system that does not answer",
    "learner": "if its stack is in backward or step, it trains: lower train.micro_batch_tokens if it swaps; if it "
    "waits in a collective, another worker is gone",
    "coordinator": "distrl stop, then distrl resume; please report the stack",
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    state: str
    waits: str
    """Who waits for whom."""
    stage: str | None
    """Whose turn it is."""
    processes: tuple[tuple[Process, str], ...]
    """Its processes on this machine, with their stacks."""
    remedy: str

    def lines(self) -> list[str]:
        told = [f"state   {self.state}", f"waits   {self.waits}"]
        if self.stage is not None:
            names = ", ".join(f"{p.pid} ({p.title})" for p, _ in self.processes)
            told.append(f"guilty  {self.stage}: {names or 'no process of it on this machine'}")
        for process, text in self.processes:
            told += [f"note    {process.pid}: {process.odd}"] if process.odd else []
            told += [f"stack of {process.pid}:", *(f"    {line}" for line in text.rstrip().splitlines())]
        return [*told, f"do      {self.remedy}"]


def diagnose(run_dir: RunDir, now_s: float | None = None) -> Diagnosis:
    """Looks at a run that is running, hung, died or over."""
    now_s = time.time() if now_s is None else now_s
    state = read_state(run_dir)
    live = read_live(run_dir)
    if state == RunState.DIED:
        waits = "nobody: the driver's process is gone without a word"
        return Diagnosis(state, waits, None, (), f"distrl resume {run_dir.path} goes on from the last checkpoint")
    if state != RunState.RUNNING:
        return Diagnosis(state, "nobody: the run is not running", None, (), "distrl status says how it ended")
    if live is None:
        waits = "the driver: Ray, the actors or the learner are starting"
        return Diagnosis(
            state, waits, None, (), "limits.start_timeout_s bounds the start; then the run says who is late"
        )
    silent = now_s - live["time_s"]
    if silent > STALE_S:
        stage, waits = "coordinator", f"the driver has waited for the coordinator for {silent:.0f} s"
    else:
        stage, waits = guilty(live), f"{where(live)}; nothing has moved for {now_s - live['progress_s']:.0f} s"
    found = of_run(run_dir, stage)
    return Diagnosis(state, waits, stage, tuple((p, stack(p.pid)) for p in found), REMEDIES[stage])


def guilty(live: dict[str, Any]) -> str:
    """The stage that everybody waits for: that of the ticket that waits longest, else the learner."""
    oldest = live["oldest"]
    if oldest is None or oldest["stage"] not in REMEDIES:
        return "learner"
    # While the learner has a batch, tickets behind it may rightly wait.
    return str(oldest["stage"])
