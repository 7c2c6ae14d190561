"""From the config's data section to a task."""

from collections.abc import Callable

from distrl.tasks.chat import as_conversations
from distrl.tasks.config import DataConfig, Source
from distrl.tasks.gym import load_reasoning_gym
from distrl.tasks.jsonl import load_jsonl
from distrl.tasks.problem import Task
from distrl.tasks.sort_digits import load_sort_digits


def _load_columns(config: DataConfig) -> Task:
    from distrl.tasks.columns import load_hf_dataset, load_parquet  # pyarrow, which the command line starts without

    return load_parquet(config) if config.source == "parquet" else load_hf_dataset(config)


_LOADERS: dict[Source, Callable[[DataConfig], Task]] = {
    "sort_digits": load_sort_digits,
    "jsonl": load_jsonl,
    "parquet": _load_columns,
    "hf_dataset": _load_columns,
    "reasoning_gym": load_reasoning_gym,
}


def load_task(config: DataConfig) -> Task:
    """The problems of the configured source, split so that no held-out prompt is trained on.

    Raises:
        ConfigError: an option is unknown to the source, or its package is missing.
        DataError: the source cannot be read, or has too few problems.
    """
    return as_conversations(_LOADERS[config.source](config), config)
