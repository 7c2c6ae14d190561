"""Who is sooner at a held-out accuracy, distrl or TRL's GRPOTrainer?

    python -m benchmarks.race --trl .venv-trl/bin/python [--repetitions 3] [--steps 60] [--picture race.svg]

The quickstart's task (1M parameters, 8 digits to sort). Both train GRPO without KL from the same warmed-up model, at
the same learning rate, with the same rollouts a step; TRL has as many torch threads as there are cores, distrl runs as
it does by default with a staleness bound of 2. The clock runs from the start of the first step to the end of each step.
Nothing is evaluated meanwhile: both leave their weights every 5 steps (TRL's clock stands still for that, distrl writes
whole checkpoints while its clock runs), and one evaluator measures all of them afterwards on the same 1,024 problems
with the same noise. The time to a target is interpolated between the two measurements around it. Start-up counts for
neither.

Prints a JSON line per repetition, and one per target with the median of the ratios. `--picture` draws the curves.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from benchmarks.against_trl import trl
from deploy.evaluate import evaluate_model
from deploy.quickstart import CONFIG, warm_model
from deploy.run import run_training
from deploy.run_dir import RunDir
from distrl.config import Config, make_config
from distrl.tasks import load_task

TARGETS = (0.4, 0.5, 0.6, 0.7)
EVERY = 5
LEARNING_RATE = 1e-4
PROBLEMS = 1024
TRAINING_PROBLEMS = 4096

Curve = list[tuple[float, float]]
"""(seconds, held-out accuracy), from the start of the first step on."""


def accuracy(config: Config, model: Path) -> float:
    """On the held-out problems of the config, by an engine in this process; one response each."""
    overrides = [f"model.path={model}", f"evaluation.problems={PROBLEMS}"]
    measured = make_config(config.model_dump(mode="json"), overrides)
    found = evaluate_model(measured, [], 1, [1], lambda name, done, problems: None)
    return float(found["sets"][0]["accuracy"]["value"])


def reached(curve: Curve, target: float) -> float | None:
    """Seconds until the curve first reaches the target, linear between two measurements; None where it does not."""
    before = curve[0]
    for now in curve:
        if now[1] >= target:
            rise = now[1] - before[1]
            return now[0] if rise <= 0 else before[0] + (now[0] - before[0]) * (target - before[1]) / rise
        before = now
    return None


def our_curve(config: Config, start: float) -> Curve:
    run_training(config)
    run_dir = RunDir(config.run_dir)
    with run_dir.metrics.open() as file:
        steps = [r for r in map(json.loads, file) if r["kind"] == "step"]
    began = steps[0]["time_s"] - steps[0]["train_s"] - steps[0]["wait_s"]
    ended = {r["step"]: r["time_s"] - began for r in steps}
    # The evaluator reads a checkpoint as any model directory.
    found = sorted((int(path.name.split("-")[1]), path) for path in run_dir.checkpoints.glob("step-*"))
    return [(0.0, start), *((ended[step], accuracy(config, path)) for step, path in found)]


def their_curve(python: Path, config: Config, model: Path, directory: Path, start: float) -> Curve:
    data, output = directory / "train.jsonl", directory / f"trl-{config.run.name}"
    task = load_task(config.data)
    problems = [task.train[i] for i in range(TRAINING_PROBLEMS)]
    data.write_text("".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in problems))
    job = {
        "model": str(model),
        "data": str(data),
        "output": str(output),
        "steps": config.train.steps,
        "rollouts_per_step": config.train.tickets_per_step * config.rollout.group_size,
        "group_size": config.rollout.group_size,
        "response_tokens": config.rollout.max_new_tokens,
        "learning_rate": LEARNING_RATE,
        "seed": config.run.seed,
        "reward": "exact",
        "save_every": EVERY,
    }
    times = trl(python, job, directory)["times"]
    saved = range(EVERY, config.train.steps + 1, EVERY)
    return [(0.0, start), *((times[step - 1], accuracy(config, output / f"step-{step}")) for step in saved)]


def race(python: Path, directory: Path, repetition: int, steps: int) -> dict[str, Curve]:
    model = warm_model(Console(stderr=True))
    overrides = [
        f"run.dir={directory / 'runs'}",
        f"run.name=race-{repetition}",
        f"run.seed={repetition}",
        "objective.recipe=grpo",
        "objective.options={kl_coefficient: 0.0}",
        f"train.steps={steps}",
        f"train.learning_rate={LEARNING_RATE}",
        f"train.checkpoint_every_steps={EVERY}",
        "train.keep_checkpoints=1000",
        "evaluation.problems=16",
        "evaluation.every_steps=0",
    ]
    config = make_config({**yaml.safe_load(CONFIG.read_text()), "model": {"path": model}}, overrides)
    start = accuracy(config, model)
    return {"distrl": our_curve(config, start), "trl": their_curve(python, config, model, directory, start)}


def draw(races: Sequence[dict[str, Curve]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "race"
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for who, label, color in (("distrl", "distrl", "tab:blue"), ("trl", "TRL", "tab:orange")):
        for number, found in enumerate(races):
            seconds, accuracies = zip(*found[who], strict=True)
            axes.plot(seconds, accuracies, color=color, marker="o", ms=3, label=None if number else label)
    axes.set_xlabel("seconds from the start of the first step")
    axes.set_ylabel(f"accuracy on {PROBLEMS:,} held-out problems")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def ratios(races: Sequence[dict[str, Curve]], target: float) -> dict[str, Any]:
    times = [{who: reached(curve, target) for who, curve in found.items()} for found in races]
    both = [t["trl"] / t["distrl"] for t in times if t["trl"] and t["distrl"]]
    return {
        "target": target,
        "reached": {who: sum(t[who] is not None for t in times) for who in ("distrl", "trl")},
        "trl_over_distrl_s": round(statistics.median(both), 3) if both else None,
        "seconds": [{who: None if s is None else round(s, 1) for who, s in t.items()} for t in times],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, default=Path(".venv-trl/bin/python"), help="Python that has TRL")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--picture", type=Path, help="SVG or PNG file to draw the curves to")
    arguments = parser.parse_args()
    if not arguments.trl.exists():
        parser.error(f"--trl must be the Python of an environment with TRL, {arguments.trl} is missing; make setup-trl")
    if arguments.steps < EVERY or arguments.steps % EVERY:
        parser.error(f"--steps must be a multiple of {EVERY}, got {arguments.steps}")
    races = []
    with tempfile.TemporaryDirectory() as name:
        for repetition in range(arguments.repetitions):
            races.append(race(arguments.trl, Path(name), repetition, arguments.steps))
            curves = {who: [(round(s, 1), round(a, 3)) for s, a in curve] for who, curve in races[-1].items()}
            print(json.dumps({"race": repetition, **curves}), flush=True)
    for target in TARGETS:
        print(json.dumps(ratios(races, target)), flush=True)
    if arguments.picture is not None:
        draw(races, arguments.picture)


if __name__ == "__main__":
    main()
