from typing import Any

import pytest
from pydantic import ValidationError

from distrl.errors import ConfigError
from distrl.tasks import DataConfig


def _refused(**values: Any) -> str:
    with pytest.raises(ValidationError) as error:
        DataConfig.model_validate(values)
    (detail,) = error.value.errors()
    cause = detail["ctx"]["error"]
    assert isinstance(cause, ConfigError)
    return str(cause)


VALUES: dict[str, Any] = {
    "path": "a.jsonl",
    "heldout_path": "b.jsonl",
    "heldout_fraction": 0.5,
    "prompt_key": "question",
    "answer_key": "solution",
    "columns": ("level",),
    "train_split": "train",
    "heldout_split": "test",
    "max_prompt_tokens": 100,
    "task": "basic_arithmetic",
    "train_size": 10,
    "heldout_size": 10,
    "seed": 1,
    "options": {},
}
SIZES = {"train_size", "heldout_size"}
FILE = SIZES | {
    "path", "heldout_path", "heldout_fraction", "prompt_key", "answer_key", "columns", "max_prompt_tokens",
}  # fmt: skip
USED: dict[str, set[str]] = {
    "sort_digits": SIZES | {"seed", "options"},
    "jsonl": FILE,
    "parquet": FILE,
    "hf_dataset": FILE | {"train_split", "heldout_split"},
    "reasoning_gym": SIZES | {"task", "seed", "options", "max_prompt_tokens"},
}
NEEDED: dict[str, dict[str, Any]] = {
    "sort_digits": {},
    "jsonl": {"path": "a.jsonl"},
    "parquet": {"path": "a.parquet"},
    "hf_dataset": {"path": "a"},
    "reasoning_gym": {"task": "basic_arithmetic"},
}


def test_every_key_is_in_these_tests() -> None:
    assert {"source", "chat_template", "system_prompt", *VALUES} == set(DataConfig.model_fields)


@pytest.mark.parametrize("source", USED)
@pytest.mark.parametrize("key", VALUES)
def test_key_is_used_by_the_source_or_refused(source: str, key: str) -> None:
    values = {"source": source, **NEEDED[source], key: VALUES[key]}
    if key in USED[source]:
        assert getattr(DataConfig.model_validate(values), key) == VALUES[key]
    else:
        message = _refused(**values)
        assert message.startswith(f"data.{key} must be empty for data.source {source}, got {VALUES[key]!r}; ")


def test_refusal_names_key_value_and_the_sources_that_use_it() -> None:
    assert _refused(source="jsonl", path="a.jsonl", seed=3) == (
        "data.seed must be empty for data.source jsonl, got 3; remove it, or set data.source to sort_digits or "
        "reasoning_gym"
    )


@pytest.mark.parametrize(
    ("source", "key"), [("jsonl", "path"), ("parquet", "path"), ("hf_dataset", "path"), ("reasoning_gym", "task")]
)
def test_key_that_the_source_needs_is_asked_for(source: str, key: str) -> None:
    assert _refused(source=source) == f"data.{key} must be set for data.source {source}, got None; set data.{key}"
    assert _refused(source=source, **{key: ""}) == (
        f"data.{key} must be set for data.source {source}, got ''; set data.{key}"
    )


@pytest.mark.parametrize("key", ["heldout_path", "heldout_split"])
def test_two_ways_to_hold_out_exclude_each_other(key: str) -> None:
    assert _refused(source="hf_dataset", path="a", heldout_fraction=0.2, **{key: "b"}) == (
        f"data.heldout_fraction must be empty where data.{key} is set, got 0.2; remove one of the two"
    )


@pytest.mark.parametrize("source", USED)
def test_every_source_may_be_a_conversation(source: str) -> None:
    values = {"source": source, **NEEDED[source], "chat_template": "model", "system_prompt": "Be brief."}
    assert DataConfig.model_validate(values).system_prompt == "Be brief."


def test_system_prompt_without_a_chat_template_is_refused() -> None:
    assert _refused(system_prompt="Be brief.") == (
        "data.system_prompt must be empty where data.chat_template is none, got 'Be brief.'; write it into the "
        "prompts, or set data.chat_template to model"
    )


@pytest.mark.parametrize("source", USED)
def test_dumped_config_loads_again(source: str) -> None:
    # A resolved config names every key, also those that do not apply: these must be empty, not just absent.
    config = DataConfig.model_validate({"source": source, **NEEDED[source]})
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config


def test_every_key_has_a_description() -> None:
    assert all(field.description for field in DataConfig.model_fields.values())
