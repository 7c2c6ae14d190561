"""Unit tests of programs: HumanEval's own solutions, broken ones, and the other forms of tests."""

import ast
import json
import os
from pathlib import Path

import pytest

from distrl.graders.code import UnitTests, program_of
from distrl.graders.grade import Grade
from distrl.sandbox.limits import SandboxConfig
from distrl.tasks import Problem

ROOT = Path(__file__).parents[2]
HUMAN_EVAL = Path(os.environ.get("DISTRL_HUMANEVAL", ROOT.parent / "shared/data/humaneval/problems.jsonl"))
GRADER = UnitTests(SandboxConfig(timeout_s=10))


def rows() -> list[dict[str, str]]:
    if not HUMAN_EVAL.is_file():
        pytest.skip(f"{HUMAN_EVAL} is not there; name it in DISTRL_HUMANEVAL")
    return [json.loads(line) for line in HUMAN_EVAL.read_text().splitlines()]


def problem_of(row: dict[str, str]) -> Problem:
    return Problem.of(row["prompt"], "", {"test": row["test"], "entry_point": row["entry_point"]})


class _NoReturns(ast.NodeTransformer):
    def visit_Return(self, node: ast.Return) -> ast.Return:
        node.value = ast.Constant(None)
        return node


def test_every_solution_of_humaneval_passes_and_none_that_returns_nothing() -> None:
    given = rows()
    problems = [problem_of(row) for row in given]
    solutions = [row["canonical_solution"] for row in given]
    broken = [ast.unparse(_NoReturns().visit(ast.parse(row["prompt"] + row["canonical_solution"]))) for row in given]
    grades = GRADER(problems, solutions)
    assert {row["task_id"]: g.reason for row, g in zip(given, grades, strict=True) if g.verdict != "correct"} == {}
    grades = GRADER(problems, broken)
    assert {row["task_id"] for row, g in zip(given, grades, strict=True) if g.verdict != "wrong"} == set()
    assert len(given) == 82


def grade(program: str, **columns: object) -> Grade:
    return GRADER([Problem.of("Write it.", "", columns)], [program])[0]


def test_asserts_call_whatever_function_they_name() -> None:
    asserts = ["assert add(1, 2) == 3", "assert sorted([add(1, 1), 1]) == [1, 2]"]
    assert grade("def add(a, b): return a + b", test_list=asserts).verdict == "correct"
    assert grade("def add(a, b): return a - b", test_list=asserts).reason == "AssertionError"
    assert grade("def sub(a, b): return a - b", test_list=asserts).reason == "NameError: name 'add' is not defined"


def test_cases_compare_standard_output() -> None:
    cases = json.dumps([{"input": "1 2\n", "output": "3\n"}, {"input": "3 4\n", "output": "7"}])
    assert grade("print(sum(map(int, input().split())))  ", cases=cases).verdict == "correct"
    assert grade("print(3)", cases=cases).reason == "case 1: got '3\\n', want '7'"
    assert grade("print(3, end='  \\n\\n')", cases=cases).reason == "case 1: got '3  \\n\\n', want '7'"
    assert grade("1 / 0", cases=cases).reason == (
        "case 0: the program ended with status 1: ZeroDivisionError: division by zero"
    )


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```\nor\n```py\nx = 2\n```", "x = 2\n"),
    ],
)
def test_the_last_fence_is_the_program(response: str, program: str) -> None:
    assert program_of(response) == program


def test_a_problem_without_tests_cannot_be_graded() -> None:
    with pytest.raises(ValueError, match=r"metadata must have one of cases, test_list and test, got \['level'\]"):
        grade("x = 1", level=1)


def test_tests_that_do_not_compile_are_no_verdict() -> None:
    from distrl.errors import StageError

    with pytest.raises(StageError, match="the process of the tests ended without a verdict"):
        grade("def f(): return 1", test="def check(", entry_point="f")
