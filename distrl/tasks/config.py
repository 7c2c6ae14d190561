"""Settings of the data: which source, and the options of that source."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from distrl.errors import ConfigError

Source = Literal["sort_digits", "jsonl", "reasoning_gym"]

_APPLIES: dict[str, frozenset[str]] = {
    "sort_digits": frozenset({"train_size", "heldout_size", "seed", "options"}),
    "jsonl": frozenset(
        {"path", "heldout_path", "heldout_fraction", "prompt_key", "answer_key", "train_size", "heldout_size"}
    ),
    "reasoning_gym": frozenset({"task", "train_size", "heldout_size", "seed", "options"}),
}
_REQUIRED = {"sort_digits": None, "jsonl": "path", "reasoning_gym": "task"}


class DataConfig(BaseModel):
    """Where prompts come from. A key that the source does not use must stay empty.

    | source          | uses                                                                                     |
    |-----------------|------------------------------------------------------------------------------------------|
    | `sort_digits`   | `train_size`, `heldout_size`, `seed`, `options`: `digits`                                |
    | `jsonl`         | `path`, `heldout_path` or `heldout_fraction`, both `_key`s, `train_size`, `heldout_size` |
    | `reasoning_gym` | `task`, `train_size`, `heldout_size`, `seed`, `options`: those of the task               |
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: Source = "sort_digits"
    """`sort_digits`: built in; `jsonl`: a file of one JSON object per line; `reasoning_gym`: that package's tasks."""
    path: str | None = None
    """JSONL file of the training problems."""
    heldout_path: str | None = None
    """JSONL file of the held-out problems; empty splits `path` by `heldout_fraction`."""
    heldout_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the prompts of `path` that is held out, chosen by their content; empty is 0.1."""
    prompt_key: str | None = None
    """Key of the prompt in a JSONL object; empty is `prompt`."""
    answer_key: str | None = None
    """Key of the reference answer in a JSONL object; empty is `answer`."""
    task: str | None = None
    """Name of a reasoning-gym task, such as `basic_arithmetic`."""
    train_size: int | None = Field(None, ge=1)
    """Training problems. Empty is the whole file (its first ones, where given), 100,000 for `sort_digits` and 2,000
    for `reasoning_gym`, which makes all of them before the run starts."""
    heldout_size: int | None = Field(None, ge=1)
    """Held-out problems. Empty is the whole file, 1,024 for `sort_digits` and 256 for `reasoning_gym`."""
    seed: int | None = Field(None, ge=0)
    """Seed of generated problems, apart from `run.seed` so that runs can be compared; empty is 0."""
    options: dict[str, object] | None = None
    """`sort_digits`: `digits` (8). `reasoning_gym`: arguments of the task's config, such as `max_terms`."""

    @model_validator(mode="after")
    def _only_keys_of_the_source(self) -> "DataConfig":
        applies = _APPLIES[self.source]
        for key in type(self).model_fields:
            if key != "source" and key not in applies and getattr(self, key) is not None:
                fitting = " or ".join(source for source, keys in _APPLIES.items() if key in keys)
                raise ConfigError(
                    f"data.{key} must be empty for data.source {self.source}, got {getattr(self, key)!r}; "
                    f"remove it, or set data.source to {fitting}"
                )
        required = _REQUIRED[self.source]
        if required is not None and not getattr(self, required):
            raise ConfigError(
                f"data.{required} must be set for data.source {self.source}, got {getattr(self, required)!r}; "
                f"set data.{required}"
            )
        if self.heldout_path is not None and self.heldout_fraction is not None:
            raise ConfigError(
                "data.heldout_fraction must be empty where data.heldout_path is set, got "
                f"{self.heldout_fraction!r}; remove one of the two"
            )
        return self
