"""Verifiers of a response's text: a pattern, a JSON schema, a format."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from distrl.errors import ConfigError
from distrl.graders.grade import Grade


def _binary(name: str, correct: bool, reason: str | None) -> Grade:
    reward = float(correct)
    return Grade(reward, {name: reward}, "correct" if correct else "wrong", reason)


class Regex:
    """1 where a regular expression finds something in the response; else 0. With a group and a reference answer, what
    the group of the last match holds must equal the answer.

    The package `regex` does the search, because it has a time limit: a pattern may backtrack for ever.

    Args:
        pattern: of the package `regex`, a superset of `re`.
        full: the whole response must match, whitespace at both ends aside.
        limit_s: seconds that one search may take; a longer one is a failure and no verdict.
    """

    def __init__(self, pattern: str, full: bool = False, limit_s: float = 1.0) -> None:
        import regex

        try:
            self._pattern = regex.compile(pattern)
        except regex.error as error:
            raise ConfigError(
                f"options.pattern of the grader regex must be a regular expression, got {pattern!r}: {error}; mend it"
            ) from error
        self._full = full
        self._limit_s = limit_s

    def __call__(self, response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
        text = str(response).strip()
        try:
            if self._full:
                matches = [m] if (m := self._pattern.fullmatch(text, timeout=self._limit_s)) else []
            else:
                matches = list(self._pattern.finditer(text, timeout=self._limit_s))
        except TimeoutError:
            reason = f"the search must end within options.limit_s = {self._limit_s:g} s, in {len(text)} characters"
            return Grade(float("nan"), verdict="failed", reason=reason)
        if not matches:
            return _binary("regex", False, "no match")
        if not answer or not self._pattern.groups:
            return _binary("regex", True, None)
        given = (matches[-1].group(1) or "").strip()
        correct = given == answer.strip()
        return _binary("regex", correct, None if correct else f"got {given!r}, want {answer!r}")


class Format(Regex):
    """1 where the whole response has a form: by default `<think>...</think><answer>...</answer>`. The reference answer
    plays no part."""

    THINK_ANSWER = r"(?s)<think>(?:(?!</think>).)*</think>\s*<answer>(?:(?!</answer>).)*</answer>"

    def __init__(self, pattern: str = THINK_ANSWER, limit_s: float = 1.0) -> None:
        super().__init__(pattern, full=True, limit_s=limit_s)

    def __call__(self, response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
        found = super().__call__(response, "", metadata)
        return found if found.verdict == "failed" else _binary("format", found.verdict == "correct", found.reason)


class JsonSchema:
    """1 where the response is JSON that a schema accepts; else 0. See https://json-schema.org.

    A fence of three backticks around the JSON is taken off. With a reference answer that is JSON, the values must also
    be equal where `equals` says so.

    Args:
        schema: the schema; empty takes the one in the problem's metadata.
        column: name of the metadata's column, a schema or its JSON text.
        equals: whether the value must equal the reference answer's.
    """

    def __init__(self, schema: Mapping[str, Any] | None = None, column: str = "schema", equals: bool = False) -> None:
        self._schema = None if schema is None else json.dumps(schema)
        self._column = column
        self._equals = equals
        if self._schema is not None:
            _validator(self._schema)

    def __call__(self, response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
        schema = self._schema
        if schema is None:
            given = metadata.get(self._column)
            if given is None:
                reason = f"metadata must have a schema in the column {self._column!r}, got {sorted(metadata)}"
                return Grade(float("nan"), verdict="failed", reason=reason)
            schema = given if isinstance(given, str) else json.dumps(given)
        validator = _validator(schema)
        try:
            value = json.loads(_unfenced(str(response)))
        except (ValueError, RecursionError) as error:
            return _binary("json_schema", False, f"not JSON: {error}")
        try:
            fault = next(iter(validator.iter_errors(value)), None)
        except RecursionError:
            return _binary("json_schema", False, "nested too deeply")
        if fault is not None:
            return _binary("json_schema", False, f"{fault.json_path}: {fault.message}")
        if self._equals and not _same(value, json.loads(answer)):
            return _binary("json_schema", False, "accepted by the schema, but not the answer's value")
        return _binary("json_schema", True, None)


def _same(given: object, wanted: object) -> bool:
    # As JSON: in Python True equals 1.
    return json.dumps(given, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def _unfenced(text: str) -> str:
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        return text.partition("\n")[2].removesuffix("```")
    return text


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    import jsonschema

    try:
        parsed = json.loads(schema)
        kind = jsonschema.validators.validator_for(parsed, default=jsonschema.Draft202012Validator)
        kind.check_schema(parsed)
    except (ValueError, jsonschema.SchemaError) as error:
        raise ConfigError(
            f"grader json_schema: the schema must be a JSON schema, got {schema[:80]}: {error}"
        ) from error
    return kind(parsed)
