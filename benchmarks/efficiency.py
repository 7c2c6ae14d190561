"""How much of the machine does an asynchronous run use?

    python -m benchmarks.efficiency [--cells "1M x 8" ...] [--repetitions 3] [--directory runs/efficiency]

For each cell (parameters x response tokens) five things are measured in turn, each in processes of its own with one
torch thread a process, as in a run:
  generation alone: the engine with as many requests in flight as a run has, nothing else on the machine;
  learning alone: the trainer's steps on ready batches of the same shape, nothing else on the machine;
  an asynchronous run: `max_staleness` 2;
  a synchronous run: `max_staleness` 0;
  generation and learning at the same time, which know nothing of each other: what the two cores leave each other of
  their caches, memory bandwidth and clock.
The async efficiency is the asynchronous run's rollouts per second over the slower of the first two; over the slower of
the last two it says what distrl itself costs. Rates are from the fourth step to the last. The five alternate over the
repetitions and medians count. A measurement that is in the directory already is not made again.

Prints a JSON line per measurement and one per cell with the ratios.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cells import CELLS, Cell, cell_config, make_cell

WARMING_STEPS = 3
SECONDS = 12.0
"""What generation alone and learning alone are measured for."""


def run_rate(metrics: Path, rollouts_per_step: int) -> float:
    """Rollouts a second of a run, after its first steps."""
    with metrics.open() as file:
        times = [r["time_s"] for r in map(json.loads, file) if r["kind"] == "step"]
    return (len(times) - 1 - WARMING_STEPS) * rollouts_per_step / (times[-1] - times[WARMING_STEPS])


def whole_run(cell: Cell, directory: Path, name: str, max_staleness: int) -> dict[str, Any]:
    """A run on Ray."""
    from deploy.run import run_training
    from deploy.run_dir import RunDir

    model, data = make_cell(directory, cell)
    config = cell_config(cell, model, data, directory / "runs", name, max_staleness=max_staleness)
    summary = run_training(config)
    rate = run_rate(RunDir(config.run_dir).metrics, cell.rollouts_per_step)
    return {"rollouts_per_s": rate, "learner_wait_fraction": summary["learner_wait_fraction"]}


async def generation_alone(cell: Cell, directory: Path) -> dict[str, Any]:
    """The engine of the config, with its slots full of requests of one ticket each."""
    import torch

    from actors.engines.build import build_engine
    from distrl.models import load_tokenizer
    from distrl.sampling import SampleRequest

    model, data = make_cell(directory, cell)
    config = cell_config(cell, model, data, directory / "runs", "none")
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(model)
    engine = build_engine(config, tokenizer)
    prompts = [tuple(tokenizer.encode(json.loads(line)["prompt"])) for line in data.read_text().splitlines()]
    finished: list[tuple[float, int]] = []
    stop = False

    async def keep_busy(first: int, stride: int) -> None:
        number = first
        while not stop:
            prompt = prompts[number % len(prompts)]
            request = SampleRequest(str(number), prompt, cell.group_size, config.sampling, (0, 0, number, 0))
            responses = len(await engine.sample(request))
            finished.append((time.perf_counter(), responses))
            number += stride

    async def until_measured() -> None:
        nonlocal stop
        await asyncio.sleep(SECONDS)
        stop = True

    in_flight = cell.slots // cell.group_size
    async with asyncio.TaskGroup() as group:
        group.create_task(until_measured())
        for i in range(in_flight):
            group.create_task(keep_busy(i, in_flight))
    await engine.close()
    first, last = finished[in_flight - 1][0], finished[-1][0]  # the first round starts with an empty engine
    return {"rollouts_per_s": sum(n for _, n in finished[in_flight:]) / (last - first)}


def learning_alone(cell: Cell, directory: Path) -> dict[str, Any]:
    """The trainer's steps on random rollouts of the cell's shape, publishing left out."""
    import numpy as np
    import torch

    from benchmarks.data_plane import ticket
    from deploy.check import build_recipe
    from deploy.learner import loop_settings
    from deploy.run_dir import RunDir
    from distrl.models import load_model, load_tokenizer
    from learners.loop import Trainer

    model, data = make_cell(directory, cell)
    config = cell_config(cell, model, data, directory / "runs", "none")
    torch.set_num_threads(1)
    settings = loop_settings(config, RunDir(config.run_dir))
    trainer = Trainer(load_model(model, torch.float32), load_tokenizer(model), build_recipe(config), settings)
    rng = np.random.default_rng(0)
    tickets = [
        (generation, grading, None)
        for generation, grading, _ in (
            ticket(i, cell.group_size, cell.response_tokens, rng, prompt_tokens=16, vocabulary=4096)
            for i in range(cell.tickets_per_step)
        )
    ]
    times = []
    while len(times) < WARMING_STEPS + 2 or times[-1] - times[WARMING_STEPS] < SECONDS:
        trainer.step(trainer.training_batch(tickets), len(times) + 1)
        times.append(time.perf_counter())
    steps = len(times) - 1 - WARMING_STEPS
    return {"rollouts_per_s": steps * cell.rollouts_per_step / (times[-1] - times[WARMING_STEPS])}


def together(cell: Cell, directory: Path) -> dict[str, Any]:
    """The slower of generation alone and learning alone while the other is measured as well."""
    command = [sys.executable, "-m", "benchmarks.efficiency", "--directory", str(directory), "--cells", cell.name]
    both = [
        subprocess.Popen([*command, "--only", what], stdout=subprocess.PIPE, text=True)
        for what in ("generation", "learning")
    ]
    answers = [process.communicate()[0] for process in both]
    if any(process.returncode for process in both):
        raise SystemExit("generation and learning must end with status 0; what they said is above")
    return {"rollouts_per_s": min(json.loads(answer.splitlines()[-1])["rollouts_per_s"] for answer in answers)}


def measure(what: str, cell: Cell, directory: Path, name: str) -> dict[str, Any]:
    match what:
        case "generation":
            return asyncio.run(generation_alone(cell, directory))
        case "learning":
            return learning_alone(cell, directory)
        case "together":
            return together(cell, directory)
        case "asynchronous":
            return whole_run(cell, directory, name, 2)
        case _:
            return whole_run(cell, directory, name, 0)


WHAT = ("generation", "learning", "asynchronous", "synchronous", "together")


def once(what: str, cell: Cell, directory: Path, repetition: int) -> dict[str, Any]:
    """One measurement in a process of its own, or its result where it was made before."""
    name = f"{cell.name.replace(' ', '')}-{what}-{repetition}"
    kept = directory / f"{name}.json"
    if not kept.exists():
        shutil.rmtree(directory / "runs" / name, ignore_errors=True)  # of a run that was interrupted
        command = [sys.executable, "-m", "benchmarks.efficiency", "--directory", str(directory)]
        command += ["--cells", cell.name, "--only", what, "--name", name]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        kept.write_text(answer.stdout.splitlines()[-1])
    result: dict[str, Any] = json.loads(kept.read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("runs/efficiency"))
    parser.add_argument("--only", choices=WHAT, help="one measurement in this process")
    parser.add_argument("--name", default="alone", help="of the run that --only makes")
    arguments = parser.parse_args()
    directory = arguments.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    if arguments.only:
        print(json.dumps(measure(arguments.only, CELLS[arguments.cells[0]], directory, arguments.name)))
        return
    for cell in (CELLS[name] for name in arguments.cells):
        rates: dict[str, list[float]] = {what: [] for what in WHAT}
        for repetition in range(arguments.repetitions):
            for what in WHAT:
                result = once(what, cell, directory, repetition)
                rates[what].append(result["rollouts_per_s"])
                print(json.dumps({"cell": cell.name, "repetition": repetition, "what": what, **result}), flush=True)
        median = {what: statistics.median(values) for what, values in rates.items()}
        limit = min(median["generation"], median["learning"])
        ratios = {
            "async_efficiency": round(median["asynchronous"] / limit, 3),
            "slower_alone": "generation" if limit == median["generation"] else "learning",
            "async_over_together": round(median["asynchronous"] / median["together"], 3),
            "async_over_sync": round(median["asynchronous"] / median["synchronous"], 3),
        }
        print(json.dumps({"cell": cell.name, **ratios}), flush=True)


if __name__ == "__main__":
    main()
