"""Parquet files and dataset directories take the path of `tests/tasks/test_jsonl.py`; here is what is theirs."""

import datetime
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrl.errors import ConfigError, DataError
from distrl.tasks import DataConfig, Task, load_task

ROWS = [{"prompt": f"{n} + {n} =", "answer": str(2 * n), "level": n % 3, "tags": ["sum"]} for n in range(40)]


def _parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return str(path)


def _load(source: str, path: str, **values: Any) -> Task:
    return load_task(DataConfig.model_validate({"source": source, "path": path, **values}))


def _refused(source: str, path: str, kind: type[Exception] = DataError, **values: Any) -> str:
    with pytest.raises(kind) as error:
        _load(source, path, **values)
    return str(error.value)


@pytest.fixture
def splits(tmp_path: Path) -> str:
    datasets = pytest.importorskip("datasets")
    parts = {"train": ROWS[:30], "test": ROWS[30:]}
    whole = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    whole.save_to_disk(tmp_path / "splits")
    return str(tmp_path / "splits")


def test_parquet_gives_the_problems_that_the_same_rows_give_as_json_lines(tmp_path: Path) -> None:
    import json

    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert _load("parquet", _parquet(tmp_path / "a.parquet")) == _load("jsonl", str(lines))


def test_hf_dataset_gives_them_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    # A shuffled dataset keeps its order in a separate column of indices.
    shuffled = datasets.Dataset.from_list(ROWS).shuffle(seed=1)
    shuffled.save_to_disk(tmp_path / "a")
    task = _load("hf_dataset", str(tmp_path / "a"))
    same = _load("parquet", _parquet(tmp_path / "a.parquet", list(shuffled)))
    assert task == same


def test_splits_of_a_dataset(splits: str) -> None:
    task = _load("hf_dataset", splits, heldout_split="test")
    assert [task.train[i].prompt for i in range(30)] == [row["prompt"] for row in ROWS[:30]]
    assert [p.prompt for p in task.heldout] == [row["prompt"] for row in ROWS[30:]]
    swapped = _load("hf_dataset", splits, train_split="test", heldout_split="train")
    assert len(swapped.train) == 10
    other = _load("hf_dataset", splits, train_split="test", heldout_path=splits, heldout_split="train")
    assert other == swapped
    assert len(_load("hf_dataset", splits).train) < 30  # a fraction of `train`; `test` is not touched


def test_unknown_split_is_refused_with_the_known_ones(splits: str) -> None:
    assert _refused("hf_dataset", splits, heldout_split="val") == (
        f"data.heldout_split must be a split of {splits!r}, got 'val' but it has 'train', 'test'; set "
        "data.heldout_split"
    )


def test_split_of_a_dataset_without_splits_is_refused(splits: str) -> None:
    path = f"{splits}/train"
    assert _refused("hf_dataset", path, train_split="train") == (
        f"data.train_split must be empty for a dataset without splits, got 'train' for {path!r}; remove it"
    )


def test_directory_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rule = "data.path must be a directory written by save_to_disk of the package datasets, got "
    assert _refused("hf_dataset", str(tmp_path)) == (
        f"{rule}{str(tmp_path)!r}: Directory {tmp_path} is neither a `Dataset` directory nor a `DatasetDict` "
        "directory; check the path"
    )
    missing = str(tmp_path / "none")
    assert _refused("hf_dataset", missing) == f"{rule}{missing!r}: Directory {missing} not found; check the path"


def test_missing_package_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert _refused("hf_dataset", "a", ConfigError) == (
        "data.source hf_dataset needs the package datasets, which cannot be imported: import of datasets halted; None "
        "in sys.modules; install it with pip install 'distrl[datasets]'"
    )


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("data.prompt_key", {"prompt_key": "question"}),
        ("data.answer_key", {"answer_key": "question"}),
        ("data.columns", {"columns": ["question"]}),
    ],
)
def test_unknown_column_is_refused_with_the_known_ones(tmp_path: Path, setting: str, values: dict[str, Any]) -> None:
    path = _parquet(tmp_path / "a")
    assert _refused("parquet", path, **values) == (
        f"{setting} must be a column of data.path {path!r}, got 'question' but it has 'prompt', 'answer', 'level', "
        f"'tags'; set {setting}"
    )


def test_column_that_json_does_not_have_is_refused_unless_it_is_not_used(tmp_path: Path) -> None:
    day = datetime.date(2020, 1, 1)
    path = _parquet(tmp_path / "a", [{**row, "day": day} for row in ROWS])
    assert _refused("parquet", path) == (
        f"data.path {path!r} must have texts, numbers, lists or structs in the columns that are used, got 'day' of "
        "type date32[day]; name the columns that the grader needs in data.columns"
    )
    assert _load("parquet", path, columns=["level"]).heldout[0].metadata.keys() == {"level"}


def test_value_that_is_not_a_text_is_refused_with_its_row(tmp_path: Path) -> None:
    rows = [*ROWS[:3], {**ROWS[3], "answer": None}]
    path = _parquet(tmp_path / "a", rows)
    assert _refused("parquet", path) == (
        f"data.path {path!r} row 4 must have a string as 'answer', got None; convert the column to strings"
    )


def test_missing_empty_and_damaged_files_are_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    assert _refused("parquet", missing) == (
        f"data.path must be a readable Parquet file, got {missing!r}: No such file or directory; check the path"
    )
    empty = str(tmp_path / "empty")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), empty)
    assert _refused("parquet", empty) == (
        f"data.path must hold at least one problem, got {empty!r}, which is empty; check the path"
    )
    damaged = tmp_path / "damaged"
    damaged.write_text("{}\n")
    assert _refused("parquet", str(damaged)).startswith(
        f"data.path must be a Parquet file, got {str(damaged)!r}: Could not open Parquet input source"
    )
