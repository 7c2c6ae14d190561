"""Settings of adapters that contradict each other are refused, and the plan says what is published."""

from pathlib import Path
from typing import Any

import pytest

from deploy.check import check_run
from deploy.explain import explain
from deploy.remote.generation import engine_config
from distrl.config import Config, make_config
from distrl.errors import ConfigError
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.builders import refusal


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    size = TinyArchitecture(hidden_size=32, layers=1, heads=2, intermediate_size=32)
    make_tiny_model(directory, character_tokenizer(ALPHABET), seed=0, architecture=size)
    return directory


def config(path: Path, **lora: Any) -> Config:
    data: dict[str, Any] = {"source": "sort_digits", "heldout_size": 8, "options": {"digits": 4}}
    return make_config({"model": {"path": path}, "data": data, "lora": lora, "evaluation": {"problems": 8}})


def test_adapters_that_are_not_there_cannot_be_published(model: Path) -> None:
    assert refusal(ConfigError, lambda: check_run(config(model, publish="adapter"))) == (
        "lora.publish must be merged where lora.rank is 0, got adapter; there are no adapters to publish: set "
        "lora.rank, or leave lora.publish out"
    )


def test_adapters_without_peft_are_refused_before_anything_starts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.check.find_spec", lambda name: None)
    assert refusal(ConfigError, lambda: check_run(config(model, rank=4))) == (
        "lora.rank must be 0 where peft is not installed, got 4; pip install 'distrl[lora]'"
    )


def test_the_plan_says_that_adapters_are_published_alone(model: Path) -> None:
    for publish, words in (("merged", "adapters of rank 4, AdamW"), ("adapter", "rank 4 published alone, AdamW")):
        chosen = config(model, rank=4, publish=publish)
        (line,) = [line for line in explain(chosen, check_run(chosen)) if line.startswith("learns")]
        assert words in line


def test_the_reference_model_has_no_adapters(model: Path) -> None:
    chosen = config(model, rank=4, publish="adapter")
    assert engine_config(chosen, "reference").lora.rank == 0
    assert engine_config(chosen, "opponent").lora.rank == 4
