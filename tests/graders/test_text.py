"""Verifiers of text: what they accept, what they refuse, and how long they may take."""

import json
import math
from collections.abc import Mapping

import pytest

from distrl.errors import ConfigError
from distrl.graders.grade import Grade
from distrl.graders.text import Format, JsonSchema, Regex
from tests.builders import refusal


@pytest.mark.parametrize(
    ("options", "response", "answer", "verdict", "reason"),
    [
        ({"pattern": r"\d+"}, "it is 42.", "", "correct", None),
        ({"pattern": r"\d+"}, "it is not.", "", "wrong", "no match"),
        ({"pattern": r"\d+", "full": True}, "it is 42.", "", "wrong", "no match"),
        ({"pattern": r"\d+", "full": True}, " 42\n", "", "correct", None),
        ({"pattern": r"answer: (\d+)"}, "answer: 1, no, answer: 42", "42", "correct", None),
        ({"pattern": r"answer: (\d+)"}, "answer: 42, no, answer: 1", "42", "wrong", "got '1', want '42'"),
        # Without a group there is nothing to compare: that it matches is all.
        ({"pattern": r"\d+"}, "it is 41.", "42", "correct", None),
    ],
)
def test_regex(options: Mapping[str, object], response: str, answer: str, verdict: str, reason: str | None) -> None:
    grade = Regex(**options)(response, answer, {})  # type: ignore[arg-type]
    assert (grade.verdict, grade.reward, grade.reason) == (verdict, float(verdict == "correct"), reason)


def test_a_pattern_that_backtracks_for_ever_is_a_failure_and_no_verdict() -> None:
    grade = Regex(r"(a|aa)+\d\1z", limit_s=0.2)("a" * 5000, "", {})
    assert grade.verdict == "failed"
    assert math.isnan(grade.reward)
    assert grade.reason == "the search must end within options.limit_s = 0.2 s, in 5000 characters"


def test_a_pattern_that_is_none_is_refused() -> None:
    assert refusal(ConfigError, lambda: Regex("(")) == (
        "options.pattern of the grader regex must be a regular expression, got '(': missing ) at position 1; mend it"
    )


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("<think>a\nb</think>\n<answer>5</answer>", "correct"),
        ("<think></think><answer></answer>", "correct"),
        ("<think>a</think><answer>5</answer> and more", "wrong"),
        ("<think>a</think>5", "wrong"),
        ("<think>a</think></think><answer>5</answer>", "wrong"),
        ("<answer>5</answer><think>a</think>", "wrong"),
    ],
)
def test_format(response: str, verdict: str) -> None:
    grade = Format()(response, "5", {})
    assert (grade.verdict, grade.components) == (verdict, {"format": float(verdict == "correct")})


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}


@pytest.mark.parametrize(
    ("response", "verdict", "reason"),
    [
        ('{"age": 3}', "correct", None),
        ('```json\n{"age": 3}\n```', "correct", None),
        ('{"age": -1}', "wrong", "$.age: -1 is less than the minimum of 0"),
        ('{"age": "3"}', "wrong", "$.age: '3' is not of type 'integer'"),
        ("{}", "wrong", "$: 'age' is a required property"),
        ("{age: 3}", "wrong", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[" * 100_000, "wrong", None),
    ],
)
def test_json_schema(response: str, verdict: str, reason: str | None) -> None:
    grade = JsonSchema(SCHEMA)(response, "", {})
    assert grade.verdict == verdict
    if reason is not None or verdict == "correct":
        assert grade.reason == reason


def test_a_schema_may_come_with_the_problem_and_the_value_may_count() -> None:
    grader = JsonSchema(equals=True)
    metadata = {"schema": json.dumps(SCHEMA)}
    assert grader('{"age": 3}', '{"age": 3}', metadata).verdict == "correct"
    assert grader('{"age": 4}', '{"age": 3}', metadata).verdict == "wrong"
    # In Python True equals 1, in JSON it does not.
    assert JsonSchema({}, equals=True)("true", "1", {}).verdict == "wrong"


def test_no_schema_is_a_failure_and_no_verdict() -> None:
    grade: Grade = JsonSchema()("{}", "", {"level": 1})
    assert (grade.verdict, grade.reason) == (
        "failed",
        "metadata must have a schema in the column 'schema', got ['level']",
    )


def test_a_schema_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="the schema must be a JSON schema"):
        JsonSchema({"type": "objekt"})
