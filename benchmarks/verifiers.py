"""Seconds to grade HumanEval in the sandbox, and answers per second of math-verify, with 1 process and with several.

    python -m benchmarks.verifiers --humaneval problems.jsonl --gsm8k train.jsonl

Prints JSON lines. Rates are measured side by side in one run, after the processes are up.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from distrl.graders.build import build_graders
from distrl.graders.config import GraderConfig
from distrl.sandbox.limits import SandboxConfig
from distrl.tasks import Problem

PROBLEMS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    shared = Path(__file__).parents[2] / "shared/data"
    parser.add_argument("--humaneval", type=Path, default=shared / "humaneval/problems.jsonl")
    parser.add_argument("--gsm8k", type=Path, default=shared / "gsm8k/train.jsonl")
    arguments = parser.parse_args()
    several = len(os.sched_getaffinity(0))
    for parallel in (1, several):
        print(json.dumps(asyncio.run(human_eval(arguments.humaneval, parallel))), flush=True)
    for processes in (1, several):
        print(json.dumps(asyncio.run(gsm8k(arguments.gsm8k, processes))), flush=True)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def human_eval(path: Path, parallel: int) -> dict[str, object]:
    """The canonical solutions and, with the same processes, an endless loop in the place of one."""
    given = rows(path)
    problems = [Problem.of(r["prompt"], "", {"test": r["test"], "entry_point": r["entry_point"]}) for r in given]
    solutions = [r["canonical_solution"] for r in given]
    looping = ["    while True: pass\n", *solutions[1:]]
    limits = SandboxConfig(timeout_s=10.0)
    config = GraderConfig(cache=0, timeout_s=600, options={"parallel": parallel})
    grader = build_graders({"unit_tests": config}, 1, {"sandbox": limits})
    times, correct = [], []
    for responses in (solutions, looping):
        began = time.perf_counter()
        grades = await grader.grade(problems, responses)
        times.append(time.perf_counter() - began)
        correct.append(sum(g.verdict == "correct" for g in grades))
    grader.close()
    return {
        "benchmark": "humaneval",
        "parallel": parallel,
        "problems": len(given),
        "correct": correct[0],
        "seconds": round(times[0], 2),
        "correct_with_an_endless_loop": correct[1],
        "seconds_with_an_endless_loop": round(times[1], 2),
        "timeout_s": limits.timeout_s,
    }


async def gsm8k(path: Path, processes: int) -> dict[str, object]:
    """Gold answers against themselves."""
    given = rows(path)[:PROBLEMS]
    answers = [r["answer"].rpartition("####")[2].strip() for r in given]
    problems = [Problem.of(r["question"], answer) for r, answer in zip(given, answers, strict=True)]
    grader = build_graders({"math_verify": GraderConfig(processes=processes, cache=0)}, 1)

    async def grade(some: slice) -> Sequence[object]:
        return await grader.grade(problems[some], [f"The answer is {a}." for a in answers[some]])

    await grade(slice(0, 4 * processes))  # the processes start
    began = time.perf_counter()
    await grade(slice(None))
    seconds = time.perf_counter() - began
    grader.close()
    return {"benchmark": "gsm8k", "processes": processes, "answers_per_s": round(len(given) / seconds)}


if __name__ == "__main__":
    main()
