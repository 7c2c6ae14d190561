"""Does a slow grader slow training down?

    python -m benchmarks.latency_hiding [--repetitions 3] [--steps 16]

Four runs of one config: asynchronous (a staleness bound of 4) and synchronous, each with a grader that answers at
once and with one that takes a second per ticket (64 tickets are graded at the same time). Nothing else hides the
second from the synchronous run: a step's tickets are sampled together, and there is no reference scoring beside
grading. The runs alternate, so that a machine that changes its speed changes all four. A run's figure is its optimizer
steps per second from the fourth step to the last; of the repetitions the median counts. Wanted: the slow grader costs
the asynchronous run at most 15%, and the synchronous run about a second a step.

Prints a JSON line per run with who waited for whom, and one with the ratios.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from deploy.quickstart import CONFIG, warm_model
from deploy.run import run_training
from deploy.run_dir import RunDir
from distrl.config import make_config

WARMING_STEPS = 3
GRADERS = {"at once": "exact", "1 s": "benchmarks.graders:one_second_per_ticket"}
BOUNDS = {"asynchronous": 4, "synchronous": 0}


def measure(model: Path, directory: Path, kind: str, grader: str, steps: int, name: str) -> dict[str, Any]:
    """One run; returns its steps per second and its waits."""
    overrides = [
        f"model.path={model}",
        f"run.dir={directory}",
        f"run.name={name}",
        f"reward.grader={GRADERS[grader]}",
        "generation.slots=512",
        "objective.options={}",
        "grading.concurrency=64",
        "grading.tickets_per_call=1",
        f"train.max_staleness={BOUNDS[kind]}",
        f"train.steps={steps}",
        "evaluation.problems=64",
        "evaluation.every_steps=0",
    ]
    config = make_config(yaml.safe_load(CONFIG.read_text()), overrides)
    summary = run_training(config)
    with RunDir(config.run_dir).metrics.open() as file:
        times = [r["time_s"] for r in map(json.loads, file) if r["kind"] == "step"]
    return {
        "kind": kind,
        "grader": grader,
        "steps_per_s": (len(times) - 1 - WARMING_STEPS) / (times[-1] - times[WARMING_STEPS]),
        "learner_waits_s": summary["learner_waits_s"],
        "learner_wait_fraction": summary["learner_wait_fraction"],
        "generation_held_s": summary["generation_held_s"],
        "max_observed_staleness": summary["max_observed_staleness"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    arguments = parser.parse_args()
    model = warm_model(Console(stderr=True))
    rates: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for repetition in range(arguments.repetitions):
            for kind in BOUNDS:
                for grader in GRADERS:
                    name = f"{repetition}-{kind}-{grader.replace(' ', '-')}"
                    result = measure(model, Path(directory), kind, grader, arguments.steps, name)
                    rates.setdefault((kind, grader), []).append(result["steps_per_s"])
                    print(json.dumps({"repetition": repetition, **result}), flush=True)
    median = {key: statistics.median(values) for key, values in rates.items()}
    print(
        json.dumps(
            {
                "asynchronous_slow_over_fast": median["asynchronous", "1 s"] / median["asynchronous", "at once"],
                "synchronous_slow_over_fast": median["synchronous", "1 s"] / median["synchronous", "at once"],
                "synchronous_seconds_added": 1 / median["synchronous", "1 s"] - 1 / median["synchronous", "at once"],
            }
        )
    )


if __name__ == "__main__":
    main()
