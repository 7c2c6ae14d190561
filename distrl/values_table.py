"""The table of optimal values: V* of every training prompt, estimated once from responses of the reference model.

A Parquet file with one row per prompt, in the order of the training set, and in its metadata the key: what the rewards
depend on. The rewards are kept, so that V* at another temperature needs no new sample. Needs no torch, so that the
coordinator can read it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distrl.errors import ConfigError, DataError

FORMAT = 1

SCHEMA = pa.schema(
    [
        pa.field("prompt_sha256", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("v_star", pa.float64(), nullable=False),
        pa.field("rewards", pa.list_(pa.field("item", pa.float64(), nullable=False)), nullable=False),
        pa.field("correct", pa.int32(), nullable=False),
        pa.field("response_tokens", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class TableKey:
    """What the rewards of a table depend on, beside the prompts, whose own keys are in its rows."""

    reference: str
    """sha256 of the manifest of the reference model's weights."""
    grader: str
    """Name and version of the grader."""
    responses: int
    """Responses per prompt, N."""
    temperature: float
    max_new_tokens: int
    seed: int
    """Of the sampling noise."""

    def differences(self, other: "TableKey") -> list[str]:
        """One "name (mine, other's)" per field that differs."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return [f"{name} ({mine!r} and {others!r})" for name, mine, others in pairs if mine != others]


@dataclass(frozen=True, slots=True)
class Estimate:
    """How V* was made from the rewards; see `distrl.objectives.optimal_value`."""

    mode: str
    beta: float


@dataclass(frozen=True, slots=True)
class PromptRewards:
    """What the reference's responses to one prompt got."""

    prompt_sha256: str
    prompt_id: str
    rewards: tuple[float, ...]
    """In the order of the responses."""
    correct: int
    """Responses with the verdict "correct"."""
    response_tokens: int


@dataclass(frozen=True, slots=True)
class ValueTable:
    """A table as it was read."""

    key: TableKey
    estimate: Estimate
    rows: tuple[PromptRewards, ...]
    v_star: tuple[float, ...]

    def by_prompt(self) -> dict[str, float]:
        """V* by prompt id."""
        return {row.prompt_id: value for row, value in zip(self.rows, self.v_star, strict=True)}

    def unsolved(self) -> frozenset[str]:
        """Ids of the prompts that no response of the reference solved."""
        return frozenset(row.prompt_id for row in self.rows if row.correct == 0)


def prompt_sha256(token_ids: Sequence[int]) -> str:
    """The key of a prompt: a hash of its tokens, as they are given to the model."""
    return hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()


def write_table(
    path: Path, key: TableKey, estimate: Estimate, rows: Sequence[PromptRewards], v_star: Sequence[float]
) -> None:
    """Writes a table aside and renames it: a file that has its name is complete. Equal content is equal bytes."""
    metadata = {"distrl.format": str(FORMAT), "distrl.key": _json(key), "distrl.estimate": _json(estimate)}
    columns: dict[str, Any] = {
        name: [getattr(row, name) for row in rows] for name in SCHEMA.names if name not in ("v_star",)
    }
    columns["v_star"] = list(v_star)
    table = pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA.with_metadata(metadata))
    aside = path.with_name(path.name + ".aside")
    pq.write_table(table, aside)
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


def read_table(path: Path, *, setting: str = "vstar.path") -> ValueTable:
    """
    Raises:
        ConfigError: there is no such file. DataError: it is not a table of values, or of a newer format.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise ConfigError(
            f"{setting} must be a table of values, there is no file {path}; make it with: distrl vstar CONFIG"
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{setting} must be a table of values, got {path}, which is no Parquet file: {error}"
        ) from error
    metadata = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
    if "distrl.key" not in metadata or table.schema.names != SCHEMA.names:
        raise DataError(
            f"{setting} must be a table of values, got {path} with the columns {', '.join(table.schema.names)}; "
            "make one with: distrl vstar CONFIG"
        )
    if int(metadata["distrl.format"]) > FORMAT:
        raise DataError(
            f"{setting}: format must be at most {FORMAT}, got {metadata['distrl.format']}; use the distrl that wrote it"
        )
    rows = table.to_pylist()
    return ValueTable(
        TableKey(**json.loads(metadata["distrl.key"])),
        Estimate(**json.loads(metadata["distrl.estimate"])),
        tuple(_row(row) for row in rows),
        tuple(row["v_star"] for row in rows),
    )


class Parts:
    """The rewards that are there already while a table is being made: a folder of small files beside it.

    A file is written aside and renamed, so that a killed process leaves whole files only; what it had not written is
    sampled again, with the same noise.

    Args:
        table: the table that is being made.
    """

    def __init__(self, table: Path, key: TableKey) -> None:
        self._folder = table.with_name(table.name + ".parts")
        self._key = key

    def open(self) -> dict[str, PromptRewards]:
        """What is there, by prompt id; makes the folder where it is missing.

        Raises:
            ConfigError: it was begun with another key.
        """
        named = self._folder / "key.json"
        if named.is_file():
            other = TableKey(**json.loads(named.read_text()))
            if differences := self._key.differences(other):
                raise ConfigError(
                    f"vstar.path: the table that was begun in {self._folder} must have this config's key, they differ "
                    f"in {', '.join(differences)}; delete that folder, or choose another vstar.path"
                )
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            aside = named.with_suffix(".aside")
            aside.write_text(_json(self._key))
            aside.replace(named)
        found = {}
        for path in sorted(self._folder.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                row = _row(json.loads(line))
                found[row.prompt_id] = row
        return found

    def add(self, rows: Sequence[PromptRewards]) -> None:
        """Writes some rows to a file of their own."""
        if not rows:
            return
        name = hashlib.sha256("".join(row.prompt_id for row in rows).encode()).hexdigest()[:16]
        aside = self._folder / f"{name}.aside"
        aside.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(aside.with_suffix(".jsonl"))

    def remove(self) -> None:
        """Removes the folder, once the table is there."""
        for path in self._folder.glob("*"):
            path.unlink()
        self._folder.rmdir()


def check_table(
    table: ValueTable, key: TableKey, prompts: Iterable[tuple[str, str]], *, setting: str = "vstar.path"
) -> None:
    """Refuses a table that was made for something else.

    Args:
        key: what the run has.
        prompts: (prompt id, prompt sha256) of every training prompt.
    Raises:
        ConfigError: names the part of the key that differs, or the first prompt that the table lacks.
    """
    if differences := key.differences(table.key):
        raise ConfigError(
            f"{setting} must be a table of this run's reference, grader and sampling, the run and the table differ in "
            f"{', '.join(differences)}; make a table for this config with: distrl vstar CONFIG"
        )
    known = {row.prompt_id: row.prompt_sha256 for row in table.rows}
    for prompt_id, digest in prompts:
        if known.get(prompt_id) != digest:
            got = "no row" if prompt_id not in known else f"other tokens (sha256 {known[prompt_id][:12]}...)"
            raise ConfigError(
                f"{setting} must have a row for every training prompt, got {got} for prompt_sha256 {digest[:12]}... "
                f"(prompt {prompt_id}); make a table for this prompt set with: distrl vstar CONFIG"
            )


def _row(values: Mapping[str, Any]) -> PromptRewards:
    return PromptRewards(
        values["prompt_sha256"],
        values["prompt_id"],
        tuple(values["rewards"]),
        values["correct"],
        values["response_tokens"],
    )


def _json(value: TableKey | Estimate) -> str:
    return json.dumps(asdict(value), sort_keys=True)
