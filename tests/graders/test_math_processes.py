"""math-verify in processes of its own: real answers, and answers that are there to hang it."""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from distrl.errors import StageError
from distrl.graders.build import build_graders
from distrl.graders.config import GraderConfig
from distrl.graders.grade import Grade
from distrl.tasks import Problem

ROOT = Path(__file__).parents[2]
GSM8K = Path(os.environ.get("DISTRL_GSM8K", ROOT.parent / "shared/data/gsm8k/train.jsonl"))
LIMIT_S = 1.0
SLACK_S = 15.0
"""Beyond the limit a process is ended and another one started, on a machine that may be busy."""

TOWERS = ["9^{9^{9}}", "9^{9^{9^{9}}}", "10^{10^{10}}", "(2^{2^{64}})", "2^{3^{4^{5^{6}}}}", "e^{e^{e^{e^{e}}}}"]
FACTORIALS = [
    "(10^9)!",
    "((50)!)!",
    "100000!",
    "\\binom{10^9}{10^8}",
    "\\prod_{n=1}^{10^9} n",
    "\\sum_{n=1}^{10^9} n^n",
]
LATEX = [
    *("\\frac{1}{2}", "\\frac12", "\\dfrac{1}{2}", "1/2", "\\frac{2}{4}", "\\boxed{\\frac{1}{2}}", "$\\frac{1}{2}$"),
    *(
        "0.5",
        ".5",
        "0.50000000000000001",
        "50\\%",
        "50%",
        "5e-1",
        "\\sqrt{1/4}",
        "2^{-1}",
        "(\\frac{1}{2})",
    ),
    *("\\frac{1}{0}", "\\frac{}{}", "\\frac{1", "\\sqrt{-1}", "\\infty", "-\\infty", "\\text{half}", "\\emptyset"),
    *("x", "x = \\frac{1}{2}", "x^2 + 1", "\\{1, 2\\}", "[0, 1)", "(1, 2, 3)", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    *("\\int_0^1 x dx", "\\int_0^\\infty e^{-x^2} dx", "\\lim_{x \\to 0} \\frac{\\sin x}{x}", "\\sin(\\sin(\\sin(1)))"),
]
UNITS = ["0.5 m", "0.5\\text{ cm}", "50 cents", "$0.50", "€0,50", "0.5°", "half", "1 of 2", "30 min", "0,5", "1 1/2"]
UNICODE = [
    "\u00bd",
    "\u0660\u066b\u0665",
    "\uff10.\uff15",
    "\u22120.5",
    "0\u20245",
    "\U0001d7ce.\U0001d7d3",
    "5\u00d710\u207b\u00b9",
    "\u202e5.0",
    "\x00",
    "\ud800",
    "🍕/2",
    "\u0300" * 1000,
]
LONG = [
    *("1" * 10_000_000, "0." + "3" * 1_000_000, "1/" * 100_000 + "2", "(" * 50_000, "((" * 500 + "1" + "))" * 500),
    *(
        "+".join(["x"] * 5_000),
        "\\frac{1}{" * 2_000 + "2" + "}" * 2_000,
        "{" * 9_000,
        "$" * 100_001,
        "\\boxed{" * 999,
    ),
    *("x^" * 5_000 + "2", "-" * 100_001 + "5", "a" * 1_000_000, "\\" * 100_000, "1," * 200_000, "\n" * 1_000_000),
]
BACKTRACKING = [
    *("1,111" * 20_000 + "x", " " * 200_000 + "x", "1 " * 50_000, "answer is " * 50_000, "\\text{" * 5_000),
    *("$ $" * 30_000, "0" * 300_000 + "x", "1.1" * 100_000, "=" * 200_000, "\\left(" * 10_000, "a b" * 60_000 + "!"),
]
EMPTY = ["", " ", "#### ", "\\boxed{}", "$$", "None", "nan", "inf", "####", "the answer"]
ADVERSARIAL = [*TOWERS, *FACTORIALS, *LATEX, *UNITS, *UNICODE, *LONG, *BACKTRACKING, *EMPTY]


def grade_each(problem: Problem, responses: Sequence[str]) -> list[tuple[Grade | StageError, float]]:
    """What became of each, and how long it took; two at a time, as many as there are processes."""

    async def grade_all() -> list[tuple[Grade | StageError, float]]:
        grader = build_graders({"math_verify": GraderConfig(timeout_s=LIMIT_S, processes=2, concurrency=2)}, 2)
        places = asyncio.Semaphore(2)

        async def one(response: str) -> tuple[Grade | StageError, float]:
            async with places:
                began = time.monotonic()
                try:
                    found: Grade | StageError = (await grader.grade([problem], [response]))[0]
                except StageError as error:
                    found = error
                return found, time.monotonic() - began

        try:
            await one("1")  # the processes start
            return await asyncio.gather(*map(one, responses))
        finally:
            grader.close()

    return asyncio.run(grade_all())


def test_a_hundred_answers_that_may_hang_are_graded_or_refused_within_the_limit() -> None:
    assert len(ADVERSARIAL) >= 100
    results = grade_each(Problem.of("What is half of one?", "\\frac{1}{2}"), ADVERSARIAL)
    graded = {r: g for r, (g, _) in zip(ADVERSARIAL, results, strict=True) if isinstance(g, Grade)}
    refused = {r: str(e) for r, (e, _) in zip(ADVERSARIAL, results, strict=True) if isinstance(e, StageError)}
    assert max(seconds for _, seconds in results) < LIMIT_S + SLACK_S
    assert all(grade.reward in (0.0, 1.0) and grade.verdict != "failed" for grade in graded.values())
    right = {"\\frac{1}{2}", "1/2", "0.5", "\\boxed{\\frac{1}{2}}"}
    wrong = {"", "x", "the answer", "-\\infty"}
    # On a busy machine the limit may cut any answer; what was graded was graded right.
    assert {r for r in right & graded.keys() if graded[r].verdict != "correct"} == set()
    assert {r for r in wrong & graded.keys() if graded[r].verdict != "wrong"} == set()
    assert all("it must answer within timeout_s = 1 s" in text or "Error" in text for text in refused.values()), refused
    assert graded


def test_the_first_gold_answers_of_gsm8k_are_correct_in_parallel() -> None:
    if not GSM8K.is_file():
        pytest.skip(f"GSM8K's train.jsonl is not at {GSM8K}; name it in DISTRL_GSM8K")
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:500]]
    answers = [row["answer"].rpartition("####")[2].strip() for row in rows]
    problems = [Problem.of(row["question"], answer) for row, answer in zip(rows, answers, strict=True)]

    async def grade() -> Sequence[Grade]:
        grader = build_graders({"math_verify": GraderConfig()}, 1)
        try:
            return await grader.grade(problems, [f"So it is {answer}." for answer in answers])
        finally:
            grader.close()

    grades = asyncio.run(grade())
    assert [row["question"] for row, g in zip(rows, grades, strict=True) if g.verdict != "correct"] == []
