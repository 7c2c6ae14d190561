import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from distrl.errors import StageError
from distrl.rewards import Grade, make_grader, math_verify
from distrl.tasks import Problem


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is 72.", "72"),
        ("so $x = \\frac{1}{2}$", "1/2"),
        ("\\boxed{0.5}", "\\frac{1}{2}"),
        ("it costs $1,000", "1000"),
        ("1000 dollars", "1,000"),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}"),
        ("$x^2 + 2x + 1$", "$(x + 1)^2$"),
        ("$(1, 2)$", "(1, 2)"),
        ("-3", "-3"),
        ("6 * 7 = 42\n#### 42", "She has 6 * 7 = <<6*7=42>>42.\n#### 42"),
        ("The final answer is 48.\n#### 66", "#### 66"),
    ],
)
def test_expressions_that_are_equal_are_correct(response: str, answer: str) -> None:
    assert math_verify(response, answer, {}) == Grade(1.0, {"math_verify": 1.0}, "correct")
    assert math_verify(f"\\boxed{{{answer.rpartition('####')[2].strip('$ ')} + 1}}", answer, {}).verdict == "wrong"


def test_wrong_expression_says_what_was_read() -> None:
    assert math_verify("\\boxed{3}", "1/2", {}) == Grade(0.0, {"math_verify": 0.0}, "wrong", "got 3, want \\frac{1}{2}")


@pytest.mark.parametrize("response", ["", "no idea", "#### none", "3 #### none", "$\\frac{1}{"])
def test_response_without_an_expression_is_wrong(response: str) -> None:
    grade = math_verify(response, "3", {})
    assert (grade.reward, grade.verdict) == (0.0, "wrong")


@pytest.mark.parametrize("answer", ["", "3 ####", "####  "])
def test_answer_without_an_expression_is_a_failure(answer: str) -> None:
    grade = math_verify("3", answer, {})
    assert math.isnan(grade.reward)
    assert grade.reason == f"answer must hold a mathematical expression, got {answer!r}"
    problem = Problem.of("prompt", answer)
    with pytest.raises(StageError) as error:
        make_grader("math_verify")([problem], ["3"])
    assert str(error.value) == f"grader math_verify failed on prompt {problem.prompt_id}: {grade.reason}"


def test_it_works_in_threads_where_signals_do_not() -> None:
    problems = [Problem.of("prompt", str(n)) for n in range(20)]
    grader = make_grader("math_verify")
    with ThreadPoolExecutor(4) as threads:
        grades = list(threads.map(lambda p: grader([p, p], [p.answer, "-1"]), problems))
    assert [[g.reward for g in pair] for pair in grades] == [[1.0, 0.0]] * 20


def test_it_says_nothing() -> None:
    code = "from distrl.rewards import math_verify; math_verify('3', '3', {})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
