"""Verifiers: judge one response by the problem's reference answer. Plain functions, without torch.

A grader returns a verdict. One that cannot (it raises, or its reward is not finite) has failed, and a failure is
never a reward of zero: training would take it for a wrong answer.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

from distrl.graders.grade import Grade, Grader, GradeResponse, Verdict
from distrl.graders.registry import check_columns, importable_from, make_grader

__all__ = [
    "Grade",
    "GradeResponse",
    "Grader",
    "Verdict",
    "check_columns",
    "exact",
    "importable_from",
    "make_grader",
    "math_verify",
    "numeric",
    "reasoning_gym",
]


def exact(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    """1 where the response equals the answer, whitespace at both ends aside; else 0."""
    return _binary("exact", response.strip() == answer.strip(), None)


def numeric(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    """1 where the number that the response gives equals the answer's; else 0.

    The number of a text is the last one in it; with a `####` mark, the first one after the last mark. A number is
    digits, or groups of three joined by commas (`1,234`), with an optional fraction (`.5`, `2.50`), exponent of at
    most four digits (`1e3`) and sign. A sign (`+`, `-` or the Unicode minus) must touch its number and follow neither
    a letter, a digit nor a closing bracket: `x=-4` is -4, `10-4` ends in 4. Units, currency signs, percent signs and
    a period that ends the sentence are ignored; fractions (`1/2`) are not evaluated, so that an answer that holds one
    fails. Numbers are compared as decimals, exactly: 2.50 equals 2.5, 0.333 does not equal 1/3.

    The answer is a number by the same rules, alone in its text, or behind its last `####`.
    """
    wanted = _answer_number(answer)
    if wanted is None:
        return Grade(math.nan, verdict="failed", reason=f"answer must be one number, got {answer!r}")
    given = _response_number(response)
    if given is None:
        return _binary("numeric", False, "no number in the response")
    return _binary("numeric", given == wanted, None if given == wanted else f"got {given}, want {wanted}")


def math_verify(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    """1 where math-verify finds the response's expression equal to the answer's; else 0.

    See https://github.com/huggingface/Math-Verify. The expression of a response is what that package extracts from
    it: a box, LaTeX between dollars, or the last plain number or fraction. Where there is a `####`, only what follows
    the last one counts, in the response and in the answer. An answer without LaTeX delimiters is taken for LaTeX as a
    whole: `1/2`, `\\frac{1}{2}`, `x^2 + 1`, `(1, 2)`. A response that cannot be parsed is wrong; an answer that cannot
    is a failure.

    Without a time limit of its own: the package's needs signals, which only a main thread gets. An expression may take
    sympy for ever (`9^{9^{9^9}}`), which is why a run gives this grader processes of its own.
    """
    wanted = _parse_answer(answer)
    if not wanted:
        return Grade(math.nan, verdict="failed", reason=f"answer must hold a mathematical expression, got {answer!r}")
    package = _math_verify()
    given = package.parse(_marked(response), parsing_timeout=None)
    if not given:
        return _binary("math_verify", False, "no expression in the response")
    correct = bool(package.verify(list(wanted), given, timeout_seconds=None))
    return _binary("math_verify", correct, None if correct else f"got {_shown(given)}, want {_shown(wanted)}")


def reasoning_gym(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    """The score in [0, 1] of the reasoning-gym task that made the problem; correct where it is 1.

    What is scored is the text of the last `<answer>...</answer>`, where there is one, else the whole response, both
    without whitespace at their ends. Some tasks evaluate the response as an expression: grade in a process of its
    own.
    """
    from distrl.tasks.gym import score

    tagged = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
    value = float(score((tagged[-1] if tagged else response).strip(), metadata))
    return Grade(value, {"reasoning_gym": value}, "correct" if value >= 1 else "wrong")


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    import math_verify as package

    # It says once per process that there is no time limit.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return package


@lru_cache(maxsize=4096)
def _parse_answer(answer: str) -> Sequence[Any]:
    # Every response of a group is compared with the same answer.
    text = _marked(answer).strip()
    if text and not any(sign in text for sign in ("$", "\\boxed", "\\(", "\\[")):
        text = f"${text}$"
    return tuple(_math_verify().parse(text, parsing_timeout=None))


def _marked(text: str) -> str:
    """What follows the last `####`, or everything."""
    return text.rpartition("####")[2]


def _shown(parsed: Sequence[Any]) -> str:
    """The extracted text: turning a sympy expression into one may take very long."""
    return str(parsed[-1])[:60]


def _binary(name: str, correct: bool, reason: str | None) -> Grade:
    reward = float(correct)
    return Grade(reward, {name: reward}, "correct" if correct else "wrong", reason)


_NUMBER = re.compile(
    r"""
    (?:(?<![\w)\]])[+-])?                # a sign, unless it is an operator or a hyphen
    (?:
        \d{1,3}(?:,\d{3})+(?![\d])       # 1,234
      | \d+
      | (?<!\d)(?=\.\d)                  # .5
    )
    (?:\.\d+)?
    (?:[eE][+-]?\d{1,4}(?!\w))?       # longer ones are beyond what Decimal can hold
    """,
    re.VERBOSE | re.ASCII,
)


def _numbers(text: str) -> list[Decimal]:
    plain = text.replace("\N{MINUS SIGN}", "-")
    return [Decimal(match.replace(",", "")) for match in _NUMBER.findall(plain)]


def _response_number(response: str) -> Decimal | None:
    _, mark, marked = response.rpartition("####")
    numbers = _numbers(marked if mark else response)
    if not numbers:
        return None
    return numbers[0] if mark else numbers[-1]


def _answer_number(answer: str) -> Decimal | None:
    numbers = _numbers(answer.rpartition("####")[2])
    return numbers[0] if len(numbers) == 1 else None
