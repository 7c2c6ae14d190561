"""Problems from Arrow tables: Parquet files, and dataset directories of the package `datasets`."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from distrl.errors import ConfigError, DataError
from distrl.tasks.config import DataConfig
from distrl.tasks.problem import Task
from distrl.tasks.rows import Row, Rows, make_task, metadata_keys, names

_BATCH_ROWS = 4096


def load_parquet(config: DataConfig) -> Task:
    """The problems of the Parquet files `path` and `heldout_path`, or directories of such files.

    Raises:
        DataError: a file is missing, damaged or empty, or lacks a column; or see `make_task`.
    """

    def rows(setting: str, path: str) -> Rows:
        return _rows(setting, repr(path), _read_parquet(setting, path), config)

    heldout = None if config.heldout_path is None else rows("data.heldout_path", config.heldout_path)
    return make_task(rows("data.path", config.path or ""), heldout, config)


def load_hf_dataset(config: DataConfig) -> Task:
    """The problems of a dataset directory written by `save_to_disk`, with or without splits.

    Raises:
        ConfigError: the package `datasets` is missing.
        DataError: a directory is missing or of another kind, or lacks a split or a column; or see `make_task`.
    """
    train = _read_split("data.path", config.path or "", "data.train_split", config.train_split, "train")
    heldout: Rows | None = None
    if config.heldout_path is not None or config.heldout_split is not None:
        setting = "data.heldout_split" if config.heldout_path is None else "data.heldout_path"
        heldout = _rows(
            setting,
            *_read_split(
                setting, config.heldout_path or config.path or "", "data.heldout_split", config.heldout_split, "test"
            ),
            config,
        )
    return make_task(_rows("data.path", *train, config), heldout, config)


def _rows(setting: str, name: str, table: pa.Table, config: DataConfig) -> Rows:
    """The needed columns of a table as rows.

    Raises:
        DataError: a column is missing or of a type that JSON does not have.
    """
    prompt_key = config.prompt_key or "prompt"
    answer_key = "answer" if config.answer_key is None else config.answer_key
    columns = dict.fromkeys(table.column_names)
    wanted = [("data.prompt_key", prompt_key), *([("data.answer_key", answer_key)] if answer_key else [])]
    wanted += [("data.columns", key) for key in config.columns or ()]
    for key_setting, key in wanted:
        if key not in columns:
            raise DataError(
                f"{key_setting} must be a column of {setting} {name}, got {key!r} but it has {names(columns)}; "
                f"set {key_setting}"
            )
    used = list(dict.fromkeys([key for _, key in wanted] + metadata_keys(columns, config)))
    for key in used:
        if not _is_plain(table.schema.field(key).type):
            raise DataError(
                f"{setting} {name} must have texts, numbers, lists or structs in the columns that are used, got "
                f"{key!r} of type {table.schema.field(key).type}; name the columns that the grader needs in "
                "data.columns"
            )
    return Rows(setting, name, "row", _iterate(table.select(used)), "convert the column to strings")


def _iterate(table: pa.Table) -> Iterator[tuple[int, Row]]:
    number = 0
    for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _is_plain(kind: pa.DataType) -> bool:
    """Whether values of a type survive a round trip through JSON."""
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    return any(
        test(kind)
        for test in (
            types.is_null, types.is_boolean, types.is_integer, types.is_floating,
            types.is_string, types.is_large_string, types.is_string_view,
        )
    )  # fmt: skip


def _read_parquet(setting: str, path: str) -> pa.Table:
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except OSError as error:
        # Arrow's own message repeats the path and adds the errno.
        reason = "No such file or directory" if isinstance(error, FileNotFoundError) else _first_line(error)
        raise DataError(f"{setting} must be a readable Parquet file, got {path!r}: {reason}; check the path") from error
    except pa.ArrowException as error:
        raise DataError(
            f"{setting} must be a Parquet file, got {path!r}: {_first_line(error)}; check the path"
        ) from error


def _read_split(setting: str, path: str, split_setting: str, split: str | None, usual: str) -> tuple[str, pa.Table]:
    """The name for messages and the table of one split."""
    datasets = _package()
    try:
        found = datasets.load_from_disk(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{setting} must be a directory written by save_to_disk of the package datasets, got {path!r}: "
            f"{_first_line(error)}; check the path"
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        if split is not None:
            raise DataError(
                f"{split_setting} must be empty for a dataset without splits, got {split!r} for {path!r}; remove it"
            )
        return repr(path), found.with_format("arrow")[:]
    name = split or usual
    if name not in found:
        raise DataError(
            f"{split_setting} must be a split of {path!r}, got {name!r} but it has {names(dict.fromkeys(found))}; "
            f"set {split_setting}"
        )
    return f"{path!r} split {name!r}", found[name].with_format("arrow")[:]


def _package() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.source hf_dataset needs the package datasets, which cannot be imported: {error}; install it with "
            "pip install 'distrl[datasets]'"
        ) from error
    return datasets


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
