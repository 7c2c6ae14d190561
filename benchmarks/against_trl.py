"""Is a run faster than TRL's GRPOTrainer on the same machine?

    python -m benchmarks.against_trl --trl .venv-trl/bin/python [--cells "1M x 8" ...] [--repetitions 3]

Both train GRPO without KL on the same model, prompts, rollouts a step and response lengths. TRL has the machine to
itself with as many torch threads as cores; distrl runs as it does by default, a staleness bound of 2 and one thread a
process. The rate is rollouts a second from the fourth step to the last; the two alternate and medians count.

`benchmarks.race` compares the time to a held-out accuracy.

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

from benchmarks.cells import CELLS, Cell, cell_config, make_cell
from benchmarks.efficiency import WARMING_STEPS, run_rate
from deploy.run import run_training
from deploy.run_dir import RunDir
from distrl.config import make_config

SCRIPT = Path(__file__).parent / "trl_run.py"


def trl(python: Path, job: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Runs TRL in its own environment; what `trl_run.py` prints."""
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
        "save_every": 0,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, default=Path(".venv-trl/bin/python"), help="Python that has TRL")
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--repetitions", type=int, default=3)
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


if __name__ == "__main__":
    main()
