"""Settings of the data: which source, and the options of that source."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from distrl.errors import ConfigError

Source = Literal["sort_digits", "jsonl", "parquet", "hf_dataset", "reasoning_gym"]

_EVERYWHERE = frozenset({"chat_template", "system_prompt", "train_size", "heldout_size"})
_FILE = _EVERYWHERE | {
    "path", "heldout_path", "heldout_fraction", "prompt_key", "answer_key", "columns", "max_prompt_tokens",
}  # fmt: skip
_APPLIES: dict[str, frozenset[str]] = {
    "sort_digits": _EVERYWHERE | {"seed", "options"},
    "jsonl": _FILE,
    "parquet": _FILE,
    "hf_dataset": _FILE | {"train_split", "heldout_split"},
    "reasoning_gym": _EVERYWHERE | {"task", "seed", "options", "max_prompt_tokens"},
}
_REQUIRED = {"jsonl": "path", "parquet": "path", "hf_dataset": "path", "reasoning_gym": "task"}


class DataConfig(BaseModel):
    """Where prompts come from. A key that the source does not use must stay empty.

    | source          | uses, beside `chat_template`, `system_prompt`, `train_size` and `heldout_size`                 |
    |-----------------|------------------------------------------------------------------------------------------------|
    | `sort_digits`   | `seed`, `options`: `digits`                                                                    |
    | `jsonl`         | `path`, `heldout_path` or `heldout_fraction`, both `_key`s, `columns`, `max_prompt_tokens`     |
    | `parquet`       | as `jsonl`                                                                                     |
    | `hf_dataset`    | as `jsonl`, and `train_split`, `heldout_split`                                                 |
    | `reasoning_gym` | `task`, `seed`, `options`: those of the task, `max_prompt_tokens`                              |
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: Source = "sort_digits"
    """`sort_digits`: built in; `jsonl`: a file of one JSON object per line; `parquet`: a Parquet file; `hf_dataset`: a
    directory that `save_to_disk` of the package `datasets` wrote; `reasoning_gym`: that package's tasks."""
    path: str | None = None
    """File or directory of the training problems."""
    heldout_path: str | None = None
    """File or directory of the held-out problems; empty splits `path` by `heldout_fraction`."""
    heldout_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the prompts of `path` that is held out, chosen by their content; empty is 0.1."""
    train_split: str | None = None
    """Split of an `hf_dataset` to train on; empty is `train`, or everything where the dataset has no splits."""
    heldout_split: str | None = None
    """Split of an `hf_dataset` to hold out, of `heldout_path` where that is set; empty is `test` there."""
    prompt_key: str | None = None
    """Column of the prompt: a text, or a list of messages with `role` and `content`; empty is `prompt`."""
    answer_key: str | None = None
    """Column of the reference answer, a text; empty is `answer`, `''` is none (for graders that need none)."""
    columns: tuple[str, ...] | None = None
    """Further columns that travel with a problem to its grader, as metadata; empty is all of them."""
    task: str | None = None
    """Name of a reasoning-gym task, such as `basic_arithmetic`."""
    chat_template: Literal["none", "model"] = "none"
    """`none`: a prompt reaches the model as it stands; `model`: as a conversation, through the chat template of the
    model's tokenizer; a prompt that is a text is then the user's message."""
    system_prompt: str | None = Field(None, min_length=1)
    """System message before every conversation; needs `chat_template` `model`."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Problems whose prompt has more tokens, the chat template's among them, are left out."""
    train_size: int | None = Field(None, ge=1)
    """Training problems. Empty is the whole file (its first ones, where given), 100,000 for `sort_digits` and 2,000
    for `reasoning_gym`, which makes all of them before the run starts. `max_prompt_tokens` then leaves out some."""
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
        required = _REQUIRED.get(self.source)
        if required is not None and not getattr(self, required):
            raise ConfigError(
                f"data.{required} must be set for data.source {self.source}, got {getattr(self, required)!r}; "
                f"set data.{required}"
            )
        return self

    @model_validator(mode="after")
    def _keys_fit_each_other(self) -> "DataConfig":
        for key in ("heldout_path", "heldout_split"):
            if getattr(self, key) is not None and self.heldout_fraction is not None:
                raise ConfigError(
                    f"data.heldout_fraction must be empty where data.{key} is set, got "
                    f"{self.heldout_fraction!r}; remove one of the two"
                )
        if self.system_prompt is not None and self.chat_template == "none":
            raise ConfigError(
                f"data.system_prompt must be empty where data.chat_template is none, got {self.system_prompt!r}; "
                "write it into the prompts, or set data.chat_template to model"
            )
        return self
