"""Is a run faster than TRL's GRPOTrainer on the same machine?

    python -m benchmarks.against_trl --trl .venv-trl/bin/python [--cells "1M x 8" ...] [--repetitions 3] [--race]

Both train GRPO without KL on the same model, prompts, rollouts a step and response lengths. TRL has the machine to
itself with as many torch threads as cores; distrl runs as it does by default, a staleness bound of 2 and one thread a
process. The rate is rollouts a second from the fourth step to the last; the two alternate and medians count.

`--race` adds the time to a held-out accuracy on the quickstart's task (1M parameters, 8 digits): both start from the
same warmed-up model at the same learning rate, and the clock runs from the first step's start. TRL's clock stands still
while it is evaluated; distrl's goes on. Start-up counts for neither.

Prints a JSON line per run and one per cell with the ratio. `make setup-trl` makes the environment.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from benchmarks.cells import CELLS, Cell, cell_config, make_cell
from benchmarks.efficiency import WARMING_STEPS, run_rate
from deploy.quickstart import CONFIG, warm_model
from deploy.run import run_training
from deploy.run_dir import RunDir
from distrl.config import make_config
from distrl.tasks import load_task

TARGET = 0.5
RACE_STEPS = 60
RACE_EVERY = 5
LEARNING_RATE = 1e-4
SCRIPT = Path(__file__).parent / "trl_run.py"


def trl(python: Path, job: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Runs TRL in its own environment; its step times in seconds, and (seconds, held-out accuracy) pairs."""
    job = {"threads": os.cpu_count(), "output": str(directory / "trl"), **job}
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    answer = subprocess.run(
        [str(python), str(SCRIPT), json.dumps(job)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if answer.returncode:
        raise SystemExit(f"{python} {SCRIPT} ended with status {answer.returncode}:\n{answer.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


def trl_rate(python: Path, cell: Cell, directory: Path) -> float:
    model, data = make_cell(directory, cell)
    job = {
        "model": str(model),
        "data": str(data),
        "steps": min(cell.steps, 8),
        "rollouts_per_step": cell.rollouts_per_step,
        "group_size": cell.group_size,
        "response_tokens": cell.response_tokens,
        "learning_rate": 1e-6,
        "seed": 0,
        "reward": "parity",
        "evaluate_every": 0,
    }
    times = trl(python, job, directory)["times"]
    return float((len(times) - 1 - WARMING_STEPS) * cell.rollouts_per_step / (times[-1] - times[WARMING_STEPS]))


def our_rate(cell: Cell, directory: Path, name: str) -> float:
    model, data = make_cell(directory, cell)
    config = cell_config(cell, model, data, directory / "runs", name)
    grpo = make_config(
        config.model_dump(mode="json"), ["objective.recipe=grpo", "objective.options={kl_coefficient: 0.0}"]
    )
    run_training(grpo)
    return run_rate(RunDir(grpo.run_dir).metrics, cell.rollouts_per_step)


def race(python: Path, directory: Path, repetition: int) -> dict[str, float | None]:
    """Seconds from the start of training to the held-out accuracy; None where it was not reached."""
    model = warm_model(Console(stderr=True))
    values = {**yaml.safe_load(CONFIG.read_text()), "model": {"path": model}}
    overrides = [
        f"run.dir={directory / 'runs'}",
        f"run.name=race-{repetition}",
        f"run.seed={repetition}",
        "objective.recipe=grpo",
        "objective.options={kl_coefficient: 0.0}",
        f"train.steps={RACE_STEPS}",
        f"train.learning_rate={LEARNING_RATE}",
        "evaluation.problems=256",
        f"evaluation.every_steps={RACE_EVERY}",
    ]
    config = make_config(values, overrides)
    run_training(config)
    with RunDir(config.run_dir).metrics.open() as file:
        records = [json.loads(line) for line in file]
    first = next(r for r in records if r["kind"] == "step")
    start = first["time_s"] - first["train_s"] - first["wait_s"]
    ours = next((r["time_s"] - start for r in records if r["kind"] == "evaluation" and r["accuracy"] >= TARGET), None)
    task = load_task(config.data)
    train, heldout = directory / "train.jsonl", directory / "heldout.jsonl"
    problems = [task.train[i] for i in range(4096)]
    for path, rows in ((train, problems), (heldout, list(task.heldout)[:256])):
        path.write_text("".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in rows))
    job = {
        "model": str(model),
        "data": str(train),
        "heldout": str(heldout),
        "steps": RACE_STEPS,
        "rollouts_per_step": config.train.tickets_per_step * config.rollout.group_size,
        "group_size": config.rollout.group_size,
        "response_tokens": config.rollout.max_new_tokens,
        "learning_rate": LEARNING_RATE,
        "seed": repetition,
        "reward": "exact",
        "evaluate_every": RACE_EVERY,
        "target": TARGET,
    }
    accuracies = trl(python, job, directory)["accuracies"]
    theirs = next((seconds for seconds, accuracy in accuracies if accuracy >= TARGET), None)
    return {"distrl_s": ours, "trl_s": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, default=Path(".venv-trl/bin/python"), help="Python that has TRL")
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--race", action="store_true")
    arguments = parser.parse_args()
    if not arguments.trl.exists():
        parser.error(f"--trl must be the Python of an environment with TRL, {arguments.trl} is missing; make setup-trl")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for cell in (CELLS[name] for name in arguments.cells):
            rates: dict[str, list[float]] = {"distrl": [], "trl": []}
            for repetition in range(arguments.repetitions):
                rates["distrl"].append(our_rate(cell, directory, f"{cell.name.replace(' ', '')}-{repetition}"))
                rates["trl"].append(trl_rate(arguments.trl, cell, directory))
                line = {"cell": cell.name, "repetition": repetition}
                print(json.dumps({**line, **{k: round(v[-1], 2) for k, v in rates.items()}}), flush=True)
            median = {who: statistics.median(values) for who, values in rates.items()}
            print(json.dumps({"cell": cell.name, "distrl_over_trl": median["distrl"] / median["trl"]}), flush=True)
        if arguments.race:
            results = []
            for repetition in range(arguments.repetitions):
                results.append(race(arguments.trl, directory, repetition))
                print(json.dumps({"race": repetition, "target": TARGET, **results[-1]}), flush=True)
            ratios = [r["trl_s"] / r["distrl_s"] for r in results if r["trl_s"] and r["distrl_s"]]
            reached = {who: sum(r[who] is not None for r in results) for who in ("distrl_s", "trl_s")}
            print(json.dumps({"reached": reached, "trl_over_distrl_s": statistics.median(ratios) if ratios else None}))


if __name__ == "__main__":
    main()
