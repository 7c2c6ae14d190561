"""The forms that a grader of one's own may have, told apart by the names of its parameters.

| parameters                          | called with                                       | returns                  |
|-------------------------------------|---------------------------------------------------|--------------------------|
| `completions`, columns of the data  | a ticket's rows, as TRL's reward functions are    | a list of rewards        |
| `problems`, `responses`             | a ticket's rows                                   | a list, or Arrow columns |
| `completion` and others             | one row, as functions of a `verifiers.Rubric` are | a reward                 |
| `answer`, `entry`                   | one row, as reasoning-gym's `score_answer` is     | a reward                 |
| any other three                     | (response, answer, metadata)                      | a `Grade` or a reward    |

A rubric's functions get what they name of `prompt`, `completion`, `answer`, `state`, `info`, `task`, `parser` and the
columns of the data.
Each may be asynchronous. A class is made once with its options as arguments; then its `__call__` counts, or its
`score_answer`, or its `funcs` and `weights` (a `Rubric`). Arrow columns are a record batch or table with `reward` and
any of `verdict`, `reason`, `components` and `row`: with `row`, the number of the response, rows may come in any order,
and may be repeated.
"""

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distrl import trl_rewards
from distrl.errors import StageError
from distrl.graders.grade import Grade, Grader, GradeResponse, Verdict, checked, who_failed

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem

_RUBRIC = frozenset({"completion"})
_BATCH = frozenset({"problems", "responses"})
_ENTRY = frozenset({"answer", "entry"})


def as_grader(name: str, target: Any) -> Grader:
    """A grader from a callable or object in one of the forms above.

    Args:
        name: of the grader, for messages; what follows its last colon names the component of a bare reward.
    Returns:
        A function that raises StageError with grader and prompt id where a response cannot be judged.
    """
    part = name.rpartition(":")[2]
    if not callable(target) and hasattr(target, "score_answer"):
        target = target.score_answer
    if hasattr(target, "funcs") and hasattr(target, "weights"):
        return _each(name, part, _rubric(target))
    names = parameters_of(target)
    if trl_rewards.is_reward_function(target):
        return _together(name, part, functools.partial(trl_rewards.call, target))
    if names >= _BATCH:
        return _together(name, part, functools.partial(_call_batch, target))
    if names >= _RUBRIC:
        return _each(name, part, functools.partial(_call_rubric_function, target, {}))
    if names >= _ENTRY and "response" not in names:
        return _each(name, part, functools.partial(_call_scorer, target))
    return _each(name, part, functools.partial(_call_plain, target))


def parameters_of(target: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(target).parameters)
    except ValueError:  # Some functions written in C have no signature.
        return frozenset()


Row = Callable[["Problem", str], Any]
"""What judges one response: a grade, a reward, or an awaitable of one."""


def _each(name: str, part: str, judge: Row) -> Grader:
    async def await_all(waiting: list[Awaitable[Any]]) -> list[Any]:
        return await asyncio.gather(*waiting, return_exceptions=True)

    def grade(problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        rows = list(zip(problems, responses, strict=True))
        found: list[Any] = []
        for problem, response in rows:
            try:
                found.append(judge(problem, response))
            except Exception as error:
                raise _failed(name, problem, response, error) from error
        if any(inspect.isawaitable(value) for value in found):
            found = asyncio.run(await_all([_awaitable(value) for value in found]))
        grades = []
        for (problem, response), value in zip(rows, found, strict=True):
            if isinstance(value, Exception):
                raise _failed(name, problem, response, value) from value
            grades.append(checked(who_failed(name, problem, response), part, value))
        return grades

    return grade


async def _awaitable(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _failed(name: str, problem: "Problem", response: str, error: Exception) -> StageError:
    return StageError(f"{who_failed(name, problem, response)}: {type(error).__name__}: {error}")


def _together(name: str, part: str, call: Callable[[Sequence["Problem"], Sequence[str]], Sequence[object]]) -> Grader:
    def grade(problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        try:
            found = call(problems, responses)
        except Exception as error:
            prompts = ", ".join(dict.fromkeys(p.prompt_id for p in problems))
            raise StageError(f"grader {name} failed on prompt {prompts}: {type(error).__name__}: {error}") from error
        rows = zip(problems, responses, found, strict=True)
        return [checked(who_failed(name, p, response), part, value) for p, response, value in rows]

    return grade


def _call_batch(target: Callable[..., Any], problems: Sequence["Problem"], responses: Sequence[str]) -> list[object]:
    found = target(problems=problems, responses=responses)
    if inspect.isawaitable(found):
        found = asyncio.run(_awaitable(found))
    if hasattr(found, "to_pylist"):
        found = _from_arrow(found.to_pylist(), len(responses))
    rows = list(found)
    if len(rows) != len(responses):
        raise ValueError(f"it must return one grade per response ({len(responses)}), got {len(rows)}")
    return rows


def _from_arrow(rows: Sequence[Mapping[str, Any]], responses: int) -> list[object]:
    """Grades in the order of the responses.

    Raises:
        ValueError: a row is missing, unknown, or there twice with two contents.
    """
    if not rows or "row" not in rows[0]:
        return [_grade_of(row) for row in rows]
    found: dict[int, Grade] = {}
    for row in rows:
        number = row["row"]
        if number not in range(responses):
            raise ValueError(f"row must be from 0 to {responses - 1}, got {number}")
        grade = _grade_of(row)
        if found.setdefault(number, grade) != grade:
            raise ValueError(f"row {number} must have one grade, got {found[number]} and {grade}")
    if missing := [number for number in range(responses) if number not in found]:
        raise ValueError(f"it must return one grade per response ({responses}), got none for rows {missing}")
    return [found[number] for number in range(responses)]


def _grade_of(row: Mapping[str, Any]) -> Grade:
    reward = row["reward"]
    if reward is None:
        raise ValueError("reward must be a number in every row, got None")
    components = row.get("components") or {}
    verdict: Verdict = row.get("verdict") or ("correct" if reward >= 1 else "wrong")
    return Grade(reward, dict(components), verdict, row.get("reason"))


def _call_plain(target: GradeResponse, problem: "Problem", response: str) -> Any:
    return target(response, problem.answer, problem.metadata)


def _call_scorer(target: Callable[..., Any], problem: "Problem", response: str) -> Any:
    from distrl.tasks.gym import unpack

    packed = problem.metadata.get("entry")
    entry = dict(problem.metadata, answer=problem.answer) if packed is None else unpack(packed)
    return target(answer=response, entry=entry)


def _call_rubric_function(
    target: Callable[..., Any], objects: Mapping[str, Any], problem: "Problem", response: str
) -> Any:
    prompt = [m._asdict() for m in problem.messages] if problem.messages else problem.prompt
    completion = [{"role": "assistant", "content": response}] if problem.messages else response
    given: dict[str, Any] = {
        **problem.metadata,
        "prompt": prompt,
        "completion": completion,
        "answer": problem.answer,
        "info": problem.metadata.get("info", dict(problem.metadata)),
        "task": problem.metadata.get("task", ""),
        **objects,
    }
    given["state"] = {name: given[name] for name in ("prompt", "completion", "answer", "info", "task")}
    signature = inspect.signature(target).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in signature.values()):
        given = {name: value for name, value in given.items() if name in signature}
    return target(**given)


def rubric_functions(rubric: Any) -> Iterator[tuple[Callable[..., Any], float, Mapping[str, Any]]]:
    """Each function of a rubric, or of a group of rubrics, with its weight and the objects that it may ask for."""
    if members := getattr(rubric, "rubrics", None):
        for member in members:
            yield from rubric_functions(member)
        return
    objects = getattr(rubric, "class_objects", {})
    for function, weight in zip(rubric.funcs, rubric.weights, strict=True):
        yield function, weight, objects


def _rubric(rubric: Any) -> Row:
    """The weighted sum of a rubric's functions. A function that raises fails the response: the package itself would
    count 0."""

    async def judge(problem: "Problem", response: str) -> Grade:
        components: dict[str, float] = {}
        total = 0.0
        for function, weight, objects in rubric_functions(rubric):
            value = float(await _awaitable(_call_rubric_function(function, objects, problem, response)))
            components[function.__name__] = value
            total += weight * value
        return Grade(total, components, "correct" if total >= 1 else "wrong")

    return judge
