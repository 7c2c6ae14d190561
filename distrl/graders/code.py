"""Unit tests of code that the model wrote, in the sandbox."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from distrl.graders.grade import Grade, checked, who_failed
from distrl.sandbox.limits import SandboxConfig
from distrl.sandbox.run import Sandbox

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


class UnitTests:
    """1 where a Python program passes all tests of its problem; else 0.

    The program is what stands in the response's last fence of three backticks, or the whole response. Where it does not
    define the entry point and the prompt is plain text, it goes on with the prompt, as in HumanEval.

    Tests are in the problem's metadata, in one of these forms:

    | column        | what it holds                                                                               |
    |---------------|---------------------------------------------------------------------------------------------|
    | `test`        | Python that defines `check(candidate)`, with the function's name in `entry_point`           |
    | `test_list`   | a list of `assert`s that call the program's functions (MBPP)                                |
    | `cases`       | a list of `{"input": ..., "output": ...}` for a program's standard input and output         |

    Tests and program run in two sandboxes. Arguments and results are numbers, texts and containers of them, and go by
    value: a test sees no change that a function makes to its argument. Output is compared line by line, blanks at the
    ends of lines and empty lines at the end aside.

    Args:
        sandbox: limits of each program.
        parallel: programs of one ticket that run at the same time; 0 is one per CPU.
    """

    def __init__(self, sandbox: SandboxConfig | None = None, parallel: int = 0) -> None:
        self._sandbox = Sandbox(sandbox or SandboxConfig(), setting="the grader unit_tests")
        workers = parallel or len(os.sched_getaffinity(0))
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="unit-tests")

    def __call__(self, problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        return list(self._threads.map(self._grade, problems, responses))

    def _grade(self, problem: "Problem", response: str) -> Grade:
        passed, reason = self._passes(problem, str(response))
        reward = float(passed)
        grade = Grade(reward, {"unit_tests": reward}, "correct" if passed else "wrong", reason)
        return checked(who_failed("unit_tests", problem, response), "unit_tests", grade)

    def _passes(self, problem: "Problem", response: str) -> tuple[bool, str | None]:
        columns = problem.metadata
        program = program_of(response)
        if (cases := _list(columns.get("cases"))) is not None:
            return self._cases(program, cases)
        if (asserts := _list(columns.get("test_list"))) is not None:
            setup = str(columns.get("test_setup_code") or "")
            return self._sandbox.check(program, "\n".join([setup, *map(str, asserts)]))
        if "test" not in columns:
            raise ValueError(f"metadata must have one of cases, test_list and test, got {sorted(columns)}")
        entry_point = str(columns["entry_point"])
        context = ""
        if not problem.messages:
            context = problem.prompt  # may define what the tests use beside the entry point
            if not re.search(rf"^(?:async )?def {re.escape(entry_point)}\b", program, re.MULTILINE):
                program = problem.prompt + program
        return self._sandbox.check(program, str(columns["test"]), entry_point, context)

    def _cases(self, program: str, cases: Sequence[Mapping[str, Any]]) -> tuple[bool, str | None]:
        for number, case in enumerate(cases):
            outcome = self._sandbox.run(program, str(case["input"]))
            if outcome.ending != "exit":
                return False, f"case {number}: the program met the limit of {outcome.ending}"
            if outcome.status != 0:
                last = outcome.stderr.strip().rpartition("\n")[2]
                return False, f"case {number}: the program ended with status {outcome.status}: {last}"
            if _lines(outcome.stdout) != _lines(str(case["output"])):
                return False, f"case {number}: got {outcome.stdout[:80]!r}, want {str(case['output'])[:80]!r}"
        return True, None


def program_of(response: str) -> str:
    """What stands in the last fence, or everything."""
    fenced = _FENCE.findall(response)
    return str(fenced[-1]) if fenced else response


def _list(value: object) -> list[Any] | None:
    """A column that is a list, or its JSON text: JSON lines carry either."""
    if isinstance(value, str):
        value = json.loads(value)
    return list(value) if isinstance(value, list | tuple) else None


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
