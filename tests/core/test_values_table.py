"""The table of optimal values: what is read is what was written, and a table of something else is refused by name."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrl.errors import ConfigError, DataError
from distrl.values_table import (
    Estimate,
    Parts,
    PromptRewards,
    TableKey,
    check_table,
    prompt_sha256,
    read_table,
    write_table,
)
from tests.builders import refusal

KEY = TableKey(reference="a" * 64, grader="exact@1", responses=2, temperature=1.0, max_new_tokens=8, seed=0)
ROWS = (
    PromptRewards(prompt_sha256([1, 2]), "first", (0.0, 1.0), 1, 9),
    PromptRewards(prompt_sha256([1, 3]), "second", (0.0, 0.0), 0, 7),
)


def written(directory: Path) -> Path:
    path = directory / "values.parquet"
    write_table(path, KEY, Estimate("soft", 0.5), ROWS, [0.6, 0.0])
    return path


def test_a_table_is_read_as_it_was_written_and_equal_tables_are_equal_bytes(tmp_path: Path) -> None:
    table = read_table(written(tmp_path))
    assert (table.key, table.estimate, table.rows) == (KEY, Estimate("soft", 0.5), ROWS)
    assert table.by_prompt() == {"first": 0.6, "second": 0.0}
    assert table.unsolved() == {"second"}
    bytes_before = written(tmp_path).read_bytes()
    assert written(tmp_path).read_bytes() == bytes_before
    assert [p.name for p in tmp_path.iterdir()] == ["values.parquet"]


def test_a_prompt_is_known_by_its_tokens() -> None:
    assert prompt_sha256([1, 23]) != prompt_sha256([12, 3])
    assert prompt_sha256((1, 23)) == prompt_sha256([1, 23])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"reference": "b" * 64}, f"reference ({'b' * 64!r} and {'a' * 64!r})"),
        ({"grader": "numeric@1"}, "grader ('numeric@1' and 'exact@1')"),
        ({"responses": 8, "seed": 3}, "responses (8 and 2), seed (3 and 0)"),
    ],
)
def test_a_table_of_another_reference_or_grader_is_refused_with_the_key_that_differs(
    tmp_path: Path, change: dict[str, object], told: str
) -> None:
    table, run = read_table(written(tmp_path)), replace(KEY, **change)  # type: ignore[arg-type]
    assert refusal(ConfigError, lambda: check_table(table, run, [])) == (
        "vstar.path must be a table of this run's reference, grader and sampling, the run and the table differ in "
        f"{told}; make a table for this config with: distrl vstar CONFIG"
    )


def test_a_table_of_other_prompts_is_refused_with_the_first_that_it_lacks(tmp_path: Path) -> None:
    table = read_table(written(tmp_path))
    known = [(row.prompt_id, row.prompt_sha256) for row in ROWS]
    check_table(table, KEY, known)
    new, other = prompt_sha256([9]), prompt_sha256([8])
    assert refusal(ConfigError, lambda: check_table(table, KEY, [*known, ("third", new)])) == (
        f"vstar.path must have a row for every training prompt, got no row for prompt_sha256 {new[:12]}... (prompt "
        "third); make a table for this prompt set with: distrl vstar CONFIG"
    )
    # The same problem by another tokenizer.
    assert refusal(ConfigError, lambda: check_table(table, KEY, [("first", other)])) == (
        f"vstar.path must have a row for every training prompt, got other tokens (sha256 "
        f"{ROWS[0].prompt_sha256[:12]}...) for prompt_sha256 {other[:12]}... (prompt first); make a table for this "
        "prompt set with: distrl vstar CONFIG"
    )


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    missing, text, other, newer = (tmp_path / name for name in ("missing", "text", "other", "newer"))
    text.write_text("hello")
    pq.write_table(pa.table({"a": [1]}), other)
    table = pq.read_table(written(tmp_path))
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"distrl.format": b"2"}), newer)
    assert refusal(ConfigError, lambda: read_table(missing)) == (
        f"vstar.path must be a table of values, there is no file {missing}; make it with: distrl vstar CONFIG"
    )
    assert "no Parquet file" in refusal(DataError, lambda: read_table(text))
    assert refusal(DataError, lambda: read_table(other)) == (
        f"vstar.path must be a table of values, got {other} with the columns a; make one with: distrl vstar CONFIG"
    )
    assert refusal(DataError, lambda: read_table(newer)) == (
        "vstar.path: format must be at most 1, got 2; use the distrl that wrote it"
    )


def test_parts_hold_what_was_finished_and_no_half_of_a_file(tmp_path: Path) -> None:
    table = tmp_path / "values.parquet"
    parts = Parts(table, KEY)
    assert parts.open() == {}
    parts.add(ROWS[:1])
    parts.add(())
    (tmp_path / "values.parquet.parts" / "killed.aside").write_text('{"prompt_sha')
    assert Parts(table, KEY).open() == {"first": ROWS[0]}
    assert refusal(ConfigError, lambda: Parts(table, replace(KEY, seed=1)).open()) == (
        f"vstar.path: the table that was begun in {table}.parts must have this config's key, they differ in seed (1 "
        "and 0); delete that folder, or choose another vstar.path"
    )
    parts.remove()
    assert not (tmp_path / "values.parquet.parts").exists()
