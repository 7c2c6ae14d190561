"""Secrets do not reach a run's directory, and their masks never pass for values."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distrl.config import Config, dump_config, known_keys, load_config, make_config
from distrl.errors import ConfigError
from distrl.masking import is_secret, mask, masked_keys
from distrl.objectives import options, recipe_names
from tests.builders import refusal

SECRET = "s3cr3t-value"


@pytest.mark.parametrize(
    "key",
    ["token", "hf_token", "HF_TOKEN", "accessToken", "db-password", "client_secret", "apiKey", "APIKey", "private_key"],
)
def test_a_key_that_names_a_secret_is_masked(key: str) -> None:
    assert is_secret(key)
    assert mask({"options": [{key: SECRET}]}) == {"options": [{key: "***"}]}
    assert mask({key: {"user": "me", "value": 7}}) == {key: "***"}


@pytest.mark.parametrize(
    "key",
    ["max_tokens", "eos_token", "stop_token", "tokenizer", "prompt_key", "key", "secretary", "token_count", "", "3"],
)
def test_a_key_that_only_resembles_one_is_left(key: str) -> None:
    assert not is_secret(key)
    assert mask({key: SECRET}) == {key: SECRET}


def test_no_key_or_option_of_ours_is_taken_for_a_secret() -> None:
    names = [*known_keys(), *(f"{recipe}.{option}" for recipe in recipe_names() for option in options(recipe))]
    assert [name for name in names if is_secret(name)] == []


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://me:pass@host:8080/a?b=c#d", "https://***@host:8080/a?b=c#d"),
        ("postgresql://user:p@ss:w@host/db", "postgresql://***@host/db"),
        ("https://ghp_abc@host/x", "https://***@host/x"),
        ("s3://bucket/key?token=abc&part=2&api_key=x", "s3://bucket/key?token=***&part=2&api_key=***"),
        ("from http://a:b@x to http://c:d@y", "from http://***@x to http://***@y"),
        ("https://host/@user/path", "https://host/@user/path"),
        ("https://host/a?mail=me@host", "https://host/a?mail=me@host"),
        ("https://@host", "https://@host"),
        ("me@host:path", "me@host:path"),
        ("a?token=abc", "a?token=abc"),
        ("***", "***"),
    ],
)
def test_the_credentials_of_a_url_are_masked_and_the_rest_is_left(url: str, expected: str) -> None:
    assert mask({"where": url}) == {"where": expected}
    assert list(masked_keys({"where": expected})) == (["where"] if "***" in expected else [])


def config(**options: Any) -> Config:
    data = {"source": "reasoning_gym", "task": "basic_arithmetic", "options": options}
    return make_config({"model": {"path": "/m"}, "data": data})


def test_what_a_run_keeps_differs_from_what_it_uses_in_the_secrets_only() -> None:
    made = config(api_key=SECRET, max_tokens=8, url=f"https://me:{SECRET}@host/x", token="", nested={"token": None})
    text = dump_config(made)
    assert SECRET not in text
    assert made.data.options is not None
    assert made.data.options["api_key"] == SECRET
    values = made.model_dump(mode="json")
    values["data"]["options"] |= {"api_key": "***", "url": "https://***@host/x"}
    assert yaml.safe_load(text) == values


def test_a_config_without_secrets_is_written_as_it_is() -> None:
    made = config(max_terms=3)
    assert yaml.safe_load(dump_config(made)) == made.model_dump(mode="json")


def test_a_masked_config_is_refused_until_every_secret_is_given(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config(api_key=SECRET, url=f"https://me:{SECRET}@host/x")))
    rule = "must be the secret itself, got the mask '***' that stands for it in a run's config.yaml; pass"
    assert refusal(ConfigError, lambda: load_config(path)) == (
        f"data.options.api_key {rule} data.options.api_key=..., or put it back\n"
        f"data.options.url {rule} data.options.url=..., or put it back"
    )
    given = [f"data.options.api_key={SECRET}", "data.options.url=https://host/x"]
    assert load_config(path, given).data.options == {"api_key": SECRET, "url": "https://host/x"}
