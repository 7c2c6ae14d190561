"""Graders: judge one response by the problem's reference answer. Plain functions, without torch.

A grader returns a verdict. One that cannot (it raises, or its reward is not finite) has failed, and a failure is
never a reward of zero: training would take it for a wrong answer.
"""

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Literal, get_args

from distrl.errors import ConfigError, StageError

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem

Verdict = Literal["correct", "wrong", "failed"]


@dataclass(frozen=True, slots=True)
class Grade:
    """What a grader found."""

    reward: float
    """Finite; NaN where the verdict is "failed"."""
    components: Mapping[str, float] = field(default_factory=dict)
    """Named parts of the reward, for the record; finite."""
    verdict: Verdict = "wrong"
    """"failed": the response could not be judged, and `reason` says why."""
    reason: str | None = None
    """Why the verdict is not "correct", where there is more to say than that the answer differs."""


GradeResponse = Callable[[str, str, Mapping[str, object]], Grade]
"""(response, reference answer, the problem's metadata) -> grade."""

Grader = Callable[[Sequence["Problem"], Sequence[str]], Sequence[Grade]]
"""(problems, responses), row by row -> one grade per row."""


def make_grader(name: str, *, setting: str = "reward.grader") -> Grader:
    """A grader by its name.

    Args:
        name: `exact`, `numeric`, `reasoning_gym`, or `module:function` for a function of your own with the signature
            of `GradeResponse`.
        setting: dotted name of the config key that holds the name, for messages.
    Returns:
        A function that raises StageError with grader and prompt id where a response cannot be judged.
    Raises:
        ConfigError: there is no such grader.
    """
    judge = _BUILT_IN[name] if name in _BUILT_IN else _import(name, setting)

    def grade_all(problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        return [_grade(name, judge, p, r) for p, r in zip(problems, responses, strict=True)]

    return grade_all


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


_BUILT_IN: Mapping[str, GradeResponse] = {"exact": exact, "numeric": numeric, "reasoning_gym": reasoning_gym}


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


def _grade(name: str, judge: GradeResponse, problem: "Problem", response: str) -> Grade:
    who = f"grader {name} failed on prompt {problem.prompt_id}"
    try:
        grade = judge(response, problem.answer, problem.metadata)
    except Exception as error:
        raise StageError(f"{who}: {type(error).__name__}: {error}") from error
    if not isinstance(grade, Grade):
        raise StageError(f"{who}: it must return a Grade, got {grade!r}")
    if grade.verdict not in get_args(Verdict):
        raise StageError(f"{who}: verdict must be one of {', '.join(get_args(Verdict))}, got {grade.verdict!r}")
    if grade.verdict == "failed":
        raise StageError(f"{who}: {grade.reason}")
    for part, value in (("reward", grade.reward), *grade.components.items()):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise StageError(f"{who}: {part} must be a finite number, got {value!r}")
    return grade


def _import(name: str, setting: str) -> GradeResponse:
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigError(
            f"{setting} must be one of {', '.join(_BUILT_IN)} or module:function, got {name!r}; "
            "name the function as my_package.my_module:my_grader"
        )
    try:
        found: object = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{setting} must name a function that can be imported, got {name!r}: {error}; "
            "check the name and that its package is installed"
        ) from error
    if not callable(found):
        raise ConfigError(f"{setting} must name a function, got {name!r}, which is of type {type(found).__name__}")
    judge: GradeResponse = found
    return judge
