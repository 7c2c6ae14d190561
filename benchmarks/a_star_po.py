"""A*-PO against GRPO at equal rollouts: does it learn, what does it take?

    python -m benchmarks.a_star_po [--seeds 0 1 2] [--steps 40] [--prompts 1024] [--responses 8] [--runs runs/a-star-po]

The quickstart's task and warmed-up model, with a training set of so many prompts. Three phases per seed, each a command
of its own, one after the other: `distrl vstar` (stage 1), `distrl train` with a_star_po and one response per prompt
(stage 2), `distrl train` with grpo and 16. Both trainings have the same rollouts per step, steps, learning rate and
staleness bound; which of the two comes first alternates over the seeds. A phase that is in the directory already is not
made again.

Prints a JSON line per phase: held-out accuracy before and after, wall and processor seconds and the largest memory
(proportional set size) of all processes of the command together, looked at every second, and `others`, the share of the
machine's processors that anything else used meanwhile: where that is not about 0, wall seconds mean little. Then a line
with the rise over the seeds, its standard error, and the ratios of the medians, stage 1 counted with stage 2. With
--page it writes docs/studies/a_star_po.md with a plot. Ends with status 1 where A*-PO does not rise by more than two
standard errors.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console

from benchmarks.a_star_po_page import write
from deploy.quickstart import CONFIG, warm_model

ROLLOUTS = 256
"""Per step, of both."""
GROUP = 16
COMMAND = "from deploy.cli import main; main()"
LEARNING_RATE = 2.0e-4


class Watched:
    """Memory and processor time of a command and everything that it starts."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = [sys.executable, "-c", COMMAND, *arguments]
        self._cpu_s: dict[tuple[int, float], float] = {}
        self.largest_bytes = 0

    def run(self) -> dict[str, float]:
        """
        Raises:
            RuntimeError: the command failed; the message is what it wrote last.
        """
        began, busy = time.monotonic(), machine_busy_s()
        with subprocess.Popen(self._arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            root = psutil.Process(process.pid)
            while True:
                self._look(root)
                try:
                    said, _ = process.communicate(timeout=1.0)
                    break
                except subprocess.TimeoutExpired:
                    continue
        if process.returncode:
            raise RuntimeError(f"{' '.join(self._arguments)} ended with {process.returncode}: {said[-2000:]}")
        wall_s, cpu_s = time.monotonic() - began, sum(self._cpu_s.values())
        others_s = machine_busy_s() - busy - cpu_s
        return {
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "others": max(0.0, others_s / (wall_s * (psutil.cpu_count() or 1))),
            "largest_bytes": float(self.largest_bytes),
        }

    def _look(self, root: psutil.Process) -> None:
        held = 0
        try:
            everyone = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for one in everyone:
            try:
                with one.oneshot():
                    times = one.cpu_times()
                    self._cpu_s[one.pid, one.create_time()] = times.user + times.system
                    held += one.memory_full_info().pss
            except psutil.Error:
                continue  # it has ended since
        self.largest_bytes = max(self.largest_bytes, held)


def machine_busy_s() -> float:
    """Processor seconds that everything on the machine has used since it started."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def arguments_of(phase: str, seed: int, options: argparse.Namespace, model: Path, config: Path) -> list[str]:
    table = options.runs / f"values-{seed}.parquet"
    common = [
        f"model.path={model}",
        f"run.dir={options.runs}",
        f"run.seed={seed}",
        f"data.train_size={options.prompts}",
        f"train.steps={options.steps}",
        f"train.learning_rate={LEARNING_RATE}",
        "evaluation.every_steps=0",
    ]
    if phase == "grpo":
        recipe = ["objective.recipe=grpo", "objective.options={kl_coefficient: 0.001}", f"rollout.group_size={GROUP}"]
        return [
            *("train", str(config), *common, *recipe),
            *(f"run.name=grpo-{seed}", f"train.tickets_per_step={ROLLOUTS // GROUP}"),
        ]
    values = [
        "objective.recipe=a_star_po",
        f"objective.options={{beta: {options.beta}, importance: truncated, max_ratio: 2.0}}",
        "rollout.group_size=1",
        f"vstar.path={table}",
        f"vstar.responses={options.responses}",
        f"train.tickets_per_step={ROLLOUTS}",
        f"run.name={phase.replace(' ', '-')}-{seed}",
    ]
    return ["vstar" if phase == "stage 1" else "train", str(config), *common, *values]


def measure(phase: str, seed: int, options: argparse.Namespace, model: Path, config: Path) -> dict[str, Any]:
    """One phase, or what is kept of it."""
    kept = options.runs / f"{phase.replace(' ', '-')}-{seed}.json"
    if kept.exists():
        line = dict(json.loads(kept.read_text()))
        return line if phase == "stage 1" else {**line, **course(options.runs / f"{phase}-{seed}")}
    if phase == "stage 1":
        (options.runs / f"values-{seed}.parquet").unlink(missing_ok=True)
    line: dict[str, Any] = {
        "phase": phase,
        "seed": seed,
        **Watched(arguments_of(phase, seed, options, model, config)).run(),
    }
    if phase != "stage 1":
        summary = json.loads((options.runs / f"{phase}-{seed}" / "summary.json").read_text())
        line |= {
            "before": summary["heldout_accuracy_before"],
            "after": summary["heldout_accuracy_after"],
            "rollouts": options.steps * ROLLOUTS,
            "max_observed_staleness": summary["max_observed_staleness"],
        }
    else:
        line["rollouts"] = options.prompts * options.responses
    kept.write_text(json.dumps(line))
    return line if phase == "stage 1" else {**line, **course(options.runs / f"{phase}-{seed}")}


def course(run: Path) -> dict[str, Any]:
    """What a finished run tells of its steps: the mean reward of each, and how much of the time the learner waited."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "rewards": [round(record["reward_mean"], 4) for record in records if record["kind"] == "step"],
        "waited": json.loads((run / "summary.json").read_text())["learner_wait_fraction"],
    }


def compare(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rises over the seeds, and medians of A*-PO over those of GRPO."""

    def of(phase: str, key: str) -> list[float]:
        return [line[key] for line in lines if line["phase"] == phase]

    found: dict[str, Any] = {}
    for phase in ("a_star_po", "grpo"):
        rises = [after - before for before, after in zip(of(phase, "before"), of(phase, "after"), strict=True)]
        error = statistics.stdev(rises) / math.sqrt(len(rises)) if len(rises) > 1 else math.inf
        found[phase] = {"rise": statistics.mean(rises), "standard_error": error}
    for unit in ("cpu_s", "wall_s"):
        training, first, peer = (statistics.median(of(p, unit)) for p in ("a_star_po", "stage 1", "grpo"))
        found[f"stage_2_over_grpo_{unit}"] = training / peer
        found[f"both_stages_over_grpo_{unit}"] = (training + first) / peer
    memory = {phase: statistics.median(of(phase, "largest_bytes")) for phase in ("a_star_po", "stage 1", "grpo")}
    found["stage_1_over_grpo_memory"] = memory["stage 1"] / memory["grpo"]
    found["stage_2_over_grpo_memory"] = memory["a_star_po"] / memory["grpo"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--runs", type=Path, default=Path("runs/a-star-po"))
    parser.add_argument("--page", action="store_true", help="write docs/studies/a_star_po.md")
    parser.add_argument("--page-only", action="store_true", help="write it from the numbers beside it")
    options = parser.parse_args()
    if options.page_only:
        write(None)
        return
    options.runs = options.runs.absolute()
    options.runs.mkdir(parents=True, exist_ok=True)
    model = warm_model(Console(stderr=True)).absolute()
    config = options.runs / "run.yaml"
    values = yaml.safe_load(CONFIG.read_text())
    values.pop("objective")
    config.write_text(yaml.safe_dump(values))
    lines = []
    for seed in options.seeds:
        order = ("stage 1", "a_star_po", "grpo") if seed % 2 == 0 else ("grpo", "stage 1", "a_star_po")
        for phase in order:
            lines.append(measure(phase, seed, options, model, config))
            print(json.dumps({k: v for k, v in lines[-1].items() if k != "rewards"}), flush=True)
    found = compare(lines)
    print(json.dumps(found), flush=True)
    if options.page:
        write(lines, found)
    learned = found["a_star_po"]
    if len(options.seeds) > 1 and learned["rise"] <= 2 * learned["standard_error"]:
        sys.exit("a_star_po: no improvement beyond two standard errors")


if __name__ == "__main__":
    main()
