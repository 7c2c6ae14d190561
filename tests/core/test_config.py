"""The config: what is wrong is named with its rule, value and remedy; what is right survives a round trip."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from distrl.config import Config, dump_config, known_keys, load_config, make_config
from distrl.errors import ConfigError
from distrl.sampling import SamplingParams
from distrl.staleness import Admission
from tests.builders import refusal

MINIMAL: dict[str, Any] = {"model": {"path": "models/tiny"}, "data": {"source": "sort_digits"}}


def message(*overrides: str, values: dict[str, Any] = MINIMAL) -> str:
    return refusal(ConfigError, lambda: make_config(values, overrides))


def test_two_sections_are_enough() -> None:
    config = make_config(MINIMAL)
    assert config.train.steps == 100
    assert config.reward.grader is None


def test_relative_paths_count_from_the_directory_in_which_the_config_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config(MINIMAL, ["reference.path=ref", "run.name=b"])
    monkeypatch.chdir("/")
    assert config.model.path == tmp_path / "models/tiny"
    assert config.reference.path == tmp_path / "ref"
    assert config.run_dir == tmp_path / "runs/b"
    assert make_config(MINIMAL, ["model.path=/m"]).model.path == Path("/m")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=3", "train.stepz is not a known key, got 3; did you mean train.steps?"),
        ("rollouts.group_size=4", "rollouts is not a known key, got {'group_size': 4}; did you mean rollout?"),
        ("generation.slot=[1]", "generation.slot is not a known key, got [1]; did you mean generation.slots?"),
        ("zzz=1", "zzz is not a known key, got 1; see docs/config.md for all keys"),
        ("train.steps=0", "train.steps must be greater than or equal to 1, got 0"),
        ("train.steps=many", "train.steps must be a valid integer, unable to parse string as an integer, got 'many'"),
        ("train.learning_rate=0", "train.learning_rate must be greater than 0, got 0"),
        ("train.on_stale=drop", "train.on_stale must be 'wait', 'redraw' or 'keep', got 'drop'"),
        (
            "train.betas=[0.9]",
            "train.betas.1 is required and has no default; add it to the config or pass train.betas.1=...",
        ),
        (
            "run.name=a b",
            "run.name must match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', got 'a b'",
        ),
        ("model.path=", "model.path must not be empty; fill it in or pass model.path=..."),
        ("model.path=3", "model.path: Input is not a valid path for <class 'pathlib.Path'>, got 3"),
        ("format=2", "format must be 1, got 2"),
        ("train=3", "train must be a valid dictionary or instance of TrainConfig, got 3"),
    ],
)
def test_a_value_that_breaks_a_rule_is_named_with_the_rule(override: str, expected: str) -> None:
    assert message(override) == expected


def test_a_missing_key_is_named_with_what_to_do() -> None:
    assert message(values={"data": {}, "model": {}}) == (
        "model.path is required and has no default; add it to the config or pass model.path=..."
    )


def test_every_broken_rule_has_its_line() -> None:
    assert message("train.steps=0", "rollout.group_size=-1").splitlines() == [
        "rollout.group_size must be greater than or equal to 1, got -1",
        "train.steps must be greater than or equal to 1, got 0",
    ]


def test_a_ticket_s_responses_must_fit_into_one_actor() -> None:
    assert message("generation.slots=8", "rollout.group_size=16") == (
        "generation.slots must be >= rollout.group_size (16), got 8; a ticket's responses are sampled together"
    )
    make_config(MINIMAL, ["generation.slots=16", "rollout.group_size=16"])


@pytest.mark.parametrize(
    ("engine", "key", "given", "message_"),
    [
        (
            "transformers",
            "tensor_parallel_size",
            "2",
            "tensor_parallel_size must be 1 for generation.engine transformers",
        ),
        ("fake", "engine_args", "{dtype: auto}", "engine_args must be {} for generation.engine fake"),
        ("fake", "update_mode", "recompute", "update_mode must be 'keep' for generation.engine fake"),
    ],
)
def test_a_key_that_the_engine_does_not_read_is_refused(engine: str, key: str, given: str, message_: str) -> None:
    found = message(f"generation.engine={engine}", f"generation.{key}={given}")
    assert found.startswith(f"generation.{message_}, which does not read it, got ")
    assert found.endswith("; leave it out, or take another engine")


def test_vllm_reads_its_keys() -> None:
    overrides = ["engine=vllm", "tensor_parallel_size=2", "engine_args={dtype: auto}", "update_mode=recompute"]
    g = make_config(MINIMAL, [f"generation.{override}" for override in overrides]).generation
    assert (g.tensor_parallel_size, dict(g.engine_args), g.update_mode) == (2, {"dtype": "auto"}, "recompute")


def test_a_key_that_the_data_source_does_not_use_is_refused() -> None:
    assert message("data.task=chain_sum") == (
        "data.task must be empty for data.source sort_digits, got 'chain_sum'; "
        "remove it, or set data.source to reasoning_gym"
    )


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.steps=7", lambda c: c.train.steps == 7),
        ("train.learning_rate=1e-4", lambda c: c.train.learning_rate == 0.0001),  # YAML 1.1 reads this as text
        ("train.betas=[0.8, 0.9]", lambda c: c.train.betas == (0.8, 0.9)),
        ("reward.grader=exact", lambda c: c.reward.grader == "exact"),
        ("reward.grader=my_package.grading:judge", lambda c: c.reward.grader == "my_package.grading:judge"),
        ("reward.grader=", lambda c: c.reward.grader is None),
        ("reference.path=a=b", lambda c: c.reference.path.name == "a=b"),
        ("objective.options={clip: 2, flag: true}", lambda c: c.objective.options == {"clip": 2, "flag": True}),
        ("objective.options.clip=0.5", lambda c: c.objective.options == {"clip": 0.5}),
        ("run={name: other}", lambda c: c.run.name == "other"),
    ],
)
def test_an_override_is_a_dotted_key_and_a_yaml_value(override: str, read: Any) -> None:
    assert read(make_config(MINIMAL, [override]))


def test_the_last_override_wins_and_the_given_values_stay_as_they_are() -> None:
    values = {**MINIMAL, "train": {"steps": 5}}
    assert make_config(values, ["train.steps=6", "train.steps=7"]).train.steps == 7
    assert values["train"] == {"steps": 5}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "override must have the form section.key=value, got 'train.steps'"),
        ("=3", "override must have the form section.key=value, got '=3'"),
        ("model.path.x=3", "override 'model.path.x=3': path is a value, not a section"),
    ],
)
def test_a_malformed_override_is_refused(override: str, expected: str) -> None:
    assert message(override) == expected


def test_an_override_that_is_no_yaml_is_refused_with_the_parser_s_words() -> None:
    with pytest.raises(yaml.YAMLError) as parser:
        yaml.safe_load("[1")
    assert message("train.betas=[1") == f"override 'train.betas=[1': the value must be YAML: {parser.value}"


def test_a_file_is_read_and_overridden(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\ndata: {}\ntrain:\n  steps: 5\n  max_staleness: 1\n")
    config = load_config(path, ["train.steps=6"])
    assert (config.train.steps, config.train.max_staleness, config.model.path.name) == (6, 1, "m")


def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert refusal(ConfigError, lambda: load_config(missing)) == (
        f"config file {missing}: must be readable: No such file or directory"
    )
    scalar = tmp_path / "scalar.yaml"
    scalar.write_text("3\n")
    assert refusal(ConfigError, lambda: load_config(scalar)) == (
        f"config file {scalar}: must be a mapping of sections, got int"
    )
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert refusal(ConfigError, lambda: load_config(empty)) == (
        f"config file {empty}: must be a mapping of sections, got NoneType"
    )
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [1\n")
    with pytest.raises(yaml.YAMLError) as parser:
        yaml.safe_load("train: [1\n")
    assert refusal(ConfigError, lambda: load_config(broken)) == f"config file {broken}: must be YAML: {parser.value}"


OTHER_VALUES = [
    "run.name=b",
    "run.dir=/tmp/x",
    "train.learning_rate=3e-7",
    "train.betas=[0.5, 0.75]",
    "reward.grader=numeric",
    "objective.options={beta: 0.1, name: x, flag: false, n: 3}",
    "reference.path=ref",
    "data.options={digits: 3}",
]


@pytest.mark.parametrize("overrides", [[], OTHER_VALUES])
def test_a_dumped_config_is_the_same_config(overrides: list[str]) -> None:
    config = make_config(MINIMAL, overrides)
    again = make_config(yaml.safe_load(dump_config(config)))
    assert again == config
    assert dump_config(again) == dump_config(config)


def test_a_dumped_config_holds_every_key() -> None:
    values = yaml.safe_load(dump_config(make_config(MINIMAL)))
    dumped = list(values)
    dumped += [f"{section}.{key}" for section, keys in values.items() if isinstance(keys, dict) for key in keys]
    assert sorted(dumped) == sorted(known_keys())


def leaves(section: type[BaseModel], prefix: str = "") -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            assert (kind.__doc__ or "").strip(), f"section {prefix}{name}"
            found |= leaves(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = info.description
    return found


def test_every_key_is_documented() -> None:
    keys = leaves(Config)
    assert [name for name, description in keys.items() if not description] == []
    assert set(keys) <= set(known_keys())


@pytest.mark.parametrize("key", known_keys())
def test_a_known_key_is_not_called_unknown(key: str) -> None:
    try:
        make_config(MINIMAL, [f"{key}=~"])
    except ConfigError as error:
        assert "not a known key" not in str(error)  # noqa: PT017 - most keys may not be empty


def test_derived_values_follow_from_the_keys() -> None:
    config = make_config(
        MINIMAL,
        [
            "rollout.max_new_tokens=9",
            "rollout.temperature=0.5",
            "train.max_staleness=3",
            "train.tickets_per_step=4",
            "generation.slots=50",
            "rollout.group_size=8",
        ],
    )
    assert config.sampling == SamplingParams(9, 0.5, top_p=1.0, top_k=0)
    assert config.admission == Admission(3, 4)


def test_a_config_cannot_be_changed() -> None:
    config = make_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def test_a_redraw_that_never_happens_is_refused() -> None:
    asked = ["train.on_stale=redraw", "train.max_staleness=1", "limits.redraws=2"]
    assert make_config(MINIMAL, asked).limits.redraws == 2
    with pytest.raises(ConfigError) as synchronous:
        make_config(MINIMAL, ["train.on_stale=redraw", "train.max_staleness=0"])
    assert str(synchronous.value) == (
        "train.on_stale must be wait or keep where train.max_staleness is 0, got redraw; a synchronous step trains all "
        "tickets that are under way, and has none to draw again: raise train.max_staleness"
    )
    with pytest.raises(ConfigError) as unread:
        make_config(MINIMAL, ["limits.redraws=2"])
    assert str(unread.value) == (
        "limits.redraws must be left out where train.on_stale is wait, which draws nothing again, got 2; set "
        "train.on_stale=redraw, or leave it out"
    )


@pytest.mark.parametrize("most", [1, 2])
def test_an_elastic_learner_has_a_range(most: int) -> None:
    assert message("train.workers=2", f"train.max_workers={most}") == (
        f"train.max_workers must be > train.workers (2), got {most}; leave it out for a learner whose number of "
        "workers stays as it is"
    )
    assert make_config(MINIMAL, ["train.workers=2", "train.max_workers=3"]).train.max_workers == 3
