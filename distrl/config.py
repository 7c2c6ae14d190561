"""The config of a run: one YAML file, overridden by `key=value`, every key used or refused.

Durations end in `_s` (seconds), sizes in `_bytes`. Values derived from others are properties, never settable.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from distrl.config_sections import (
    EvaluationConfig,
    GenerationConfig,
    GradingConfig,
    LimitsConfig,
    LoraConfig,
    MetricsConfig,
    ModelConfig,
    ObjectiveConfig,
    PlacementConfig,
    PreferenceConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    Section,
    TrainConfig,
    ValuesConfig,
)
from distrl.environments.config import EnvironmentConfig
from distrl.errors import ConfigError
from distrl.masking import MASK, mask, masked_keys
from distrl.replay_config import ReplayConfig, check_replay
from distrl.sampling import SamplingParams
from distrl.sandbox.limits import SandboxConfig
from distrl.staleness import Admission
from distrl.storage_config import StorageConfig
from distrl.tasks.config import DataConfig


class Config(Section):
    """Everything that a run depends on."""

    format: Literal[1] = 1
    """Version of the config's format."""
    run: RunConfig = RunConfig()
    storage: StorageConfig = StorageConfig()
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    sandbox: SandboxConfig = SandboxConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    rollout: RolloutConfig = RolloutConfig()
    generation: GenerationConfig = GenerationConfig()
    placement: PlacementConfig = PlacementConfig()
    grading: GradingConfig = GradingConfig()
    reference: ReferenceConfig = ReferenceConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    vstar: ValuesConfig = ValuesConfig()
    preference: PreferenceConfig = PreferenceConfig()
    replay: ReplayConfig = ReplayConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    metrics: MetricsConfig = MetricsConfig()
    limits: LimitsConfig = LimitsConfig()

    @model_validator(mode="after")
    def _whole_groups_fit(self) -> "Config":
        if not self.samples:
            return self
        if self.generation.slots < self.rollout.group_size:
            raise ValueError(
                f"generation.slots must be >= rollout.group_size ({self.rollout.group_size}), got "
                f"{self.generation.slots}; a ticket's responses are sampled together"
            )
        return self

    @model_validator(mode="after")
    def _elastic_range(self) -> "Config":
        t = self.train
        if t.max_workers is not None and t.max_workers <= t.workers:
            raise ValueError(
                f"train.max_workers must be > train.workers ({t.workers}), got {t.max_workers}; leave it out for a "
                "learner whose number of workers stays as it is"
            )
        return self

    @model_validator(mode="after")
    def _engine_reads_its_keys(self) -> "Config":
        g = self.generation
        unread = {
            "tensor_parallel_size": (g.tensor_parallel_size, 1, g.engine != "vllm"),
            "engine_args": (dict(g.engine_args), {}, g.engine != "vllm"),
            "update_mode": (g.update_mode, "keep", g.engine == "fake"),
        }
        for key, (value, default, ignored) in unread.items():
            if ignored and value != default:
                raise ValueError(
                    f"generation.{key} must be {default!r} for generation.engine {g.engine}, which does not read it, "
                    f"got {value!r}; leave it out, or take another engine"
                )
        return self

    @model_validator(mode="after")
    def _redraws_happen(self) -> "Config":
        t = self.train
        if t.on_stale == "redraw" and t.max_staleness == 0:
            raise ValueError(
                "train.on_stale must be wait or keep where train.max_staleness is 0, got redraw; a synchronous step "
                "trains all tickets that are under way, and has none to draw again: raise train.max_staleness"
            )
        if t.on_stale != "redraw" and self.limits.redraws != LimitsConfig().redraws:
            raise ValueError(
                f"limits.redraws must be left out where train.on_stale is {t.on_stale}, which draws nothing again, got "
                f"{self.limits.redraws}; set train.on_stale=redraw, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _replay_is_read(self) -> "Config":
        check_replay(self)
        return self

    @property
    def replays_per_step(self) -> int:
        """Tickets of every batch that another run has recorded."""
        return self.replay.per_step(self.train.tickets_per_step)

    @property
    def offline(self) -> bool:
        """Whether all that is trained was recorded by another run."""
        return self.replays_per_step == self.train.tickets_per_step

    @property
    def samples(self) -> bool:
        """Whether anything is sampled, be it for training or to evaluate."""
        return not self.offline or self.generation.evaluation_actors > 0

    @property
    def run_dir(self) -> Path:
        return self.run.dir / self.run.name

    @property
    def sampling(self) -> SamplingParams:
        r = self.rollout
        return SamplingParams(r.max_new_tokens, r.temperature)

    @property
    def admission(self) -> Admission:
        """Of the tickets that are sampled for training."""
        return Admission(self.train.max_staleness, self.train.tickets_per_step - self.replays_per_step)


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a config file and applies `section.key=value` overrides (values are YAML).

    Relative paths in the file count from the current directory.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or a key is unknown, of the wrong type or out of range.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"config file {path}: must be readable: {error.strerror}") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path}: must be YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path}: must be a mapping of sections, got {type(values).__name__}")
    return make_config(values, overrides)


def make_config(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """A config from nested mappings and overrides; see `load_config`."""
    merged = _copy(values)
    for override in overrides:
        _apply(merged, override)
    _make_absolute(merged.get("data"), ("path", "heldout_path"))
    if masked := list(masked_keys(merged)):
        raise ConfigError("\n".join(f"{name} {_MASKED} {name}=..., or put it back" for name in masked))
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from error


_MASKED = f"must be the secret itself, got the mask {MASK!r} that stands for it in a run's config.yaml; pass"


def dump_config(config: Config) -> str:
    """The resolved config as YAML: every key with the value that the run uses, secrets masked.

    `make_config` refuses a config with a masked value: the run would use the mask.
    """
    return yaml.safe_dump(mask(config.model_dump(mode="json")), sort_keys=False)


def _make_absolute(section: Any, keys: Iterable[str]) -> None:
    for key in keys:
        if isinstance(section, dict) and isinstance(section.get(key), str) and section[key]:
            section[key] = str(Path(section[key]).absolute())


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override must have the form section.key=value, got {override!r}")
    *sections, key = name.split(".")
    at = values
    for section in sections:
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
    try:
        at[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value must be YAML: {error}") from error


def _explain(error: Any) -> str:
    """One line per broken rule: dotted name, rule, value, remedy."""
    name = ".".join(str(part) for part in error["loc"])
    value = error["input"]
    match error["type"]:
        case "extra_forbidden":
            close = get_close_matches(name, known_keys(), n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else "see docs/config.md for all keys"
            return f"{name} is not a known key, got {value!r}; {hint}"
        case "missing":
            return f"{name} is required and has no default; add it to the config or pass {name}=..."
        case "value_error":
            return str(error["ctx"]["error"])  # our validators name their keys themselves
        case _ if value is None:
            return f"{name} must not be empty; fill it in or pass {name}=..."
        case _:
            # "Input should be ...", "String should match ...", "Input is not a valid path ..."
            _, should, rule = error["msg"].partition(" should ")
            return f"{name} must {rule}, got {value!r}" if should else f"{name}: {error['msg']}, got {value!r}"


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all keys, sections included."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys
