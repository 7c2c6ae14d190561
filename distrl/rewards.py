"""Graders: judge one response by the problem's reference answer. Plain functions, without torch.

A grader returns a verdict. One that cannot (it raises, or its reward is not finite) has failed, and a failure is
never a reward of zero: training would take it for a wrong answer.

A function of one's own, `module:function`, has one of two forms, told apart by a parameter named `completions`:

    def grade(response, answer, metadata) -> Grade | float: ...
    def reward(completions, **columns) -> list[float]: ...      # TRL's, see distrl.trl_rewards

A reward that comes as a bare number is correct where it is >= 1. Functions are called from several threads at once;
`grading.concurrency=1` is for those that cannot bear it.
"""

import importlib
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

from distrl import trl_rewards
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


GradeResponse = Callable[[str, str, Mapping[str, object]], Grade | float]
"""(response, reference answer, the problem's metadata) -> grade, or a reward."""

Grader = Callable[[Sequence["Problem"], Sequence[str]], Sequence[Grade]]
"""(problems, responses), row by row -> one grade per row."""


def importable_from(folder: str) -> None:
    """Lets `module:function` name a module in a folder. Installed packages come first: none of them can be shadowed."""
    if folder not in sys.path:
        sys.path.append(folder)


def make_grader(name: str, *, setting: str = "reward.grader") -> Grader:
    """A grader by its name.

    Args:
        name: `exact`, `numeric`, `math_verify`, `reasoning_gym`, or `module:function` for a function of your own with
            the signature of `GradeResponse` or of a TRL reward function.
        setting: dotted name of the config key that holds the name, for messages.
    Returns:
        A function that raises StageError with grader and prompt id where a response cannot be judged.
    Raises:
        ConfigError: there is no such grader.
    """
    function = _BUILT_IN[name] if name in _BUILT_IN else _import(name, setting)
    part = name.rpartition(":")[2]

    def grade_each(problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        return [_grade(name, part, function, p, r) for p, r in zip(problems, responses, strict=True)]

    def grade_together(problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        try:
            rewards = trl_rewards.call(function, problems, responses)
        except Exception as error:
            prompts = ", ".join(dict.fromkeys(p.prompt_id for p in problems))
            raise StageError(f"grader {name} failed on prompt {prompts}: {type(error).__name__}: {error}") from error
        return [_checked(_who(name, p), part, reward) for p, reward in zip(problems, rewards, strict=True)]

    return grade_together if trl_rewards.is_reward_function(function) else grade_each


def check_columns(name: str, problem: "Problem", *, setting: str = "reward.grader") -> None:
    """Refuses a TRL reward function that needs a column that the data does not have.

    Args:
        name: of a grader that `make_grader` accepts.
        problem: any of the data.
    Raises:
        ConfigError: names the columns.
    """
    if name in _BUILT_IN:
        return
    function = _import(name, setting)
    columns = trl_rewards.columns_of(problem)
    if trl_rewards.is_reward_function(function) and (missing := trl_rewards.missing_columns(function, columns)):
        raise ConfigError(
            f"{setting} {name} must be given every argument that it needs, got none for {', '.join(missing)}; the "
            f"columns of the data are {', '.join(columns)}: name the others in data.columns, or give the arguments "
            "defaults"
        )


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

    Without time limit: the package's own needs signals, which only a main thread gets, and graders run in threads.
    An expression that takes sympy for ever (`9^{9^{9^9}}`) holds up its grading actor, whose calls then fail by
    `grading.timeout_s`.
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


_BUILT_IN: Mapping[str, GradeResponse] = {
    "exact": exact,
    "numeric": numeric,
    "math_verify": math_verify,
    "reasoning_gym": reasoning_gym,
}


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


def _who(name: str, problem: "Problem") -> str:
    return f"grader {name} failed on prompt {problem.prompt_id}"


def _grade(name: str, part: str, judge: GradeResponse, problem: "Problem", response: str) -> Grade:
    who = _who(name, problem)
    try:
        grade = judge(response, problem.answer, problem.metadata)
    except Exception as error:
        raise StageError(f"{who}: {type(error).__name__}: {error}") from error
    return _checked(who, part, grade)


def _checked(who: str, part: str, grade: object) -> Grade:
    """The grade that a grader returned, or that of the reward that it returned.

    Args:
        who: grader and prompt, for messages.
        part: name of the component that a bare reward becomes.
    """
    if isinstance(grade, Real):
        reward = float(grade)
        grade = Grade(reward, {part: reward}, "correct" if reward >= 1 else "wrong")
    if not isinstance(grade, Grade):
        raise StageError(f"{who}: it must give a Grade or a number, got {grade!r}")
    if grade.verdict not in get_args(Verdict):
        raise StageError(f"{who}: verdict must be one of {', '.join(get_args(Verdict))}, got {grade.verdict!r}")
    if grade.verdict == "failed":
        raise StageError(f"{who}: {grade.reason}")
    for name, value in (("reward", grade.reward), *grade.components.items()):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise StageError(f"{who}: {name} must be a finite number, got {value!r}")
    return grade


def _import(name: str, setting: str) -> Callable[..., Any]:
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
    return found
