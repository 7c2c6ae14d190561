"""How long does a user wait before anything happens?

    python -m benchmarks.start_up [--repetitions 5]

`help`: seconds of CPU of `distrl --help`, over those of `python -c "import numpy"` in the same repetition (wanted:
under 0.5 s of CPU). `first_rollout` and `first_step`: seconds from the call of `distrl train` on the quickstart's
config to the first ticket that is sampled, and to the end of the first optimizer step; beside them `import_s`, the wall
time of `python -c "import torch, transformers, ray.train"`, which no process of a run can go below.

Prints a JSON line per repetition and one with the medians.
"""

import argparse
import json
import os
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from rich.console import Console

from deploy.quickstart import CONFIG, warm_model
from deploy.run_dir import RunDir
from distrl.config import dump_config, make_config

DISTRL = str(Path(sys.executable).with_name("distrl"))


def cpu_seconds(*command: str) -> float:
    """User and system time of a finished command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def wall_seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - began


def first_times(model: Path, directory: Path, name: str) -> dict[str, float]:
    """One short run, from the call of the command."""
    overrides = [f"model.path={model}", f"run.dir={directory}", f"run.name={name}", "train.steps=2"]
    overrides += ["evaluation.problems=64", "evaluation.every_steps=0"]
    config = make_config({**yaml.safe_load(CONFIG.read_text()), "model": {"path": model}}, overrides)
    file = directory / f"{name}.yaml"
    file.write_text(dump_config(config))
    began = time.time()
    command = [DISTRL, "train", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    run_dir = RunDir(config.run_dir)
    with sqlite3.connect(f"file:{run_dir.ledger}?mode=ro", uri=True) as ledger:
        (sampled,) = ledger.execute("SELECT MIN(generated_s) FROM tickets").fetchone()
    with run_dir.metrics.open() as lines:
        stepped = next(r["time_s"] for r in map(json.loads, lines) if r["kind"] == "step")
    return {"first_rollout_s": sampled - began, "first_step_s": stepped - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    model = warm_model(Console(stderr=True))
    results = []
    with tempfile.TemporaryDirectory() as directory:
        for repetition in range(arguments.repetitions):
            result = {
                "numpy_cpu_s": cpu_seconds(sys.executable, "-c", "import numpy"),
                "help_cpu_s": cpu_seconds(DISTRL, "--help"),
                "import_s": wall_seconds(sys.executable, "-c", "import torch, transformers, ray.train"),
                **first_times(model, Path(directory), f"start-{repetition}"),
            }
            results.append(result)
            print(json.dumps({"repetition": repetition, **result}), flush=True)
    median = {key: statistics.median(r[key] for r in results) for key in results[0]}
    ratios = {
        "help_over_numpy": median["help_cpu_s"] / median["numpy_cpu_s"],
        "first_rollout_over_import": median["first_rollout_s"] / median["import_s"],
        "first_step_over_import": median["first_step_s"] / median["import_s"],
    }
    print(json.dumps({**median, **ratios}))


if __name__ == "__main__":
    main()
