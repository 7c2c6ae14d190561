"""Do the objectives learn, on Ray, asynchronously?

    python -m benchmarks.study [--recipes topr tis grpo rloo] [--seeds 0 1 2] [--steps 30] [--runs runs/study]

Runs the quickstart's task for each recipe and seed, one run after the other, from the same warmed-up model. Prints a
JSON line per run with the held-out accuracy before and after, and one per recipe with the mean rise over seeds and its
standard error. Exits with 1 where a recipe's mean rise is not more than two standard errors above 0.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import yaml
from rich.console import Console

from deploy.quickstart import CONFIG, warm_model
from deploy.run import run_training
from distrl.config import make_config

OPTIONS = {"grpo": "{kl_coefficient: 0.001}"}
"""Options that differ from the recipe's defaults: the paper's KL of 0.04 holds a tiny model back."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["topr", "tis", "grpo", "rloo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    arguments = parser.parse_args()
    model = warm_model(Console(stderr=True))
    values = yaml.safe_load(CONFIG.read_text())
    failed = []
    for recipe in arguments.recipes:
        rises = []
        for seed in arguments.seeds:
            overrides = [
                f"model.path={model}",
                f"run.dir={arguments.runs}",
                f"run.name={recipe}-{seed}",
                f"run.seed={seed}",
                f"objective.recipe={recipe}",
                f"objective.options={OPTIONS.get(recipe, '{}')}",
                f"train.steps={arguments.steps}",
                "evaluation.every_steps=0",
            ]
            summary = run_training(make_config(values, overrides))
            before, after = summary["heldout_accuracy_before"], summary["heldout_accuracy_after"]
            rises.append(after - before)
            line = {"recipe": recipe, "seed": seed, "before": before, "after": after, "wall_s": summary["wall_s"]}
            print(json.dumps({**line, "max_observed_staleness": summary["max_observed_staleness"]}), flush=True)
        mean = statistics.mean(rises)
        error = statistics.stdev(rises) / math.sqrt(len(rises)) if len(rises) > 1 else math.inf
        print(json.dumps({"recipe": recipe, "rise": mean, "standard_error": error}), flush=True)
        if len(rises) > 1 and mean <= 2 * error:
            failed.append(recipe)
    if failed:
        sys.exit(f"no improvement beyond two standard errors: {', '.join(failed)}")


if __name__ == "__main__":
    main()
