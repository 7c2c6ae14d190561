import json
from pathlib import Path
from typing import Any

import pytest

from distrl.errors import DataError
from distrl.tasks import DataConfig, Task, load_task


def _write(path: Path, *rows: Any) -> str:
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def _rows(first: int, last: int) -> list[dict[str, str]]:
    return [{"prompt": f"{n} + {n} =", "answer": str(2 * n)} for n in range(first, last)]


def _load(path: str, **values: Any) -> Task:
    return load_task(DataConfig.model_validate({"source": "jsonl", "path": path, **values}))


def _refused(path: str, **values: Any) -> str:
    with pytest.raises(DataError) as error:
        _load(path, **values)
    return str(error.value)


def _prompts(task: Task) -> tuple[list[str], list[str]]:
    return [task.train[i].prompt for i in range(len(task.train))], [p.prompt for p in task.heldout]


def test_two_files_become_two_splits_in_their_order(tmp_path: Path) -> None:
    task = _load(_write(tmp_path / "a", *_rows(0, 5)), heldout_path=_write(tmp_path / "b", *_rows(5, 8)))
    assert _prompts(task) == ([f"{n} + {n} =" for n in range(5)], [f"{n} + {n} =" for n in range(5, 8)])
    assert task.heldout[0].answer == "10"
    assert task.default_reward == "exact"


def test_fraction_splits_one_file_without_overlap_or_loss(tmp_path: Path) -> None:
    train, heldout = _prompts(_load(_write(tmp_path / "a", *_rows(0, 1000)), heldout_fraction=0.3))
    assert sorted(train + heldout) == sorted(row["prompt"] for row in _rows(0, 1000))
    # Binomial(1000, 0.3) has standard deviation 14.5.
    assert len(heldout) == pytest.approx(300, abs=4 * 14.5)


def test_fraction_is_a_tenth_by_default(tmp_path: Path) -> None:
    path = _write(tmp_path / "a", *_rows(0, 200))
    assert _prompts(_load(path)) == _prompts(_load(path, heldout_fraction=0.1))


def test_a_prompts_split_does_not_depend_on_the_other_lines(tmp_path: Path) -> None:
    _, few = _prompts(_load(_write(tmp_path / "a", *_rows(50, 100)), heldout_fraction=0.3))
    _, many = _prompts(_load(_write(tmp_path / "b", *_rows(0, 100)), heldout_fraction=0.3))
    assert set(few) == set(many) & {row["prompt"] for row in _rows(50, 100)}


def test_a_prompt_with_two_answers_is_in_one_split(tmp_path: Path) -> None:
    rows = [{**row, "answer": answer} for row in _rows(0, 100) for answer in ("yes", "no")]
    train, heldout = _prompts(_load(_write(tmp_path / "a", *rows), heldout_fraction=0.5))
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == 200


def test_sizes_take_the_first_problems(tmp_path: Path) -> None:
    a, b = _write(tmp_path / "a", *_rows(0, 5)), _write(tmp_path / "b", *_rows(5, 8))
    train, heldout = _prompts(_load(a, heldout_path=b, train_size=2, heldout_size=1))
    assert (train, heldout) == (["0 + 0 =", "1 + 1 ="], ["5 + 5 ="])


def test_keys_are_configurable_and_other_keys_travel_as_metadata(tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "solution": row["answer"], "answer": 5} for row in _rows(0, 5)]
    heldout = _write(tmp_path / "b", {"question": "5 + 5 =", "solution": "10"})
    task = _load(_write(tmp_path / "a", *rows), heldout_path=heldout, prompt_key="question", answer_key="solution")
    assert (task.train[3].prompt, task.train[3].answer) == ("3 + 3 =", "6")
    assert task.train[3].metadata == {"solution": "6", "answer": 5}
    assert task.heldout[0].metadata == {"solution": "10"}


def test_columns_choose_the_metadata(tmp_path: Path) -> None:
    rows = [{**row, "level": n, "tags": ["a"]} for n, row in enumerate(_rows(0, 20))]
    path = _write(tmp_path / "a", *rows)
    assert _load(path, columns=["level"]).train[0].metadata.keys() == {"level"}
    assert _load(path, columns=[]).train[0].metadata == {}
    assert _load(path).train[0].metadata == {"level": 0, "tags": ["a"]}
    assert _refused(path, columns=["lvl"]) == (
        f"data.path {path!r} line 1 must have the key 'lvl', got the keys 'prompt', 'answer', 'level', 'tags'; mend "
        "data.columns"
    )


def test_rows_that_differ_in_metadata_alone_are_different_problems(tmp_path: Path) -> None:
    # Grading looks problems up by their id: two of one id would be graded with one's metadata.
    row = _rows(0, 1)[0]
    rows = [{**row, "style": style} for style in ("long", "short")]
    task = _load(_write(tmp_path / "a", *rows), heldout_path=_write(tmp_path / "b", *_rows(5, 6)))
    assert task.train[0].prompt_id != task.train[1].prompt_id


def test_without_an_answer_key_there_are_no_answers(tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"]} for row in _rows(0, 20)]
    assert {p.answer for p in _load(_write(tmp_path / "a", *rows), answer_key="").heldout} == {""}


def test_blank_lines_repeated_held_out_lines_and_a_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    a, b = _write(tmp_path / "a", *_rows(0, 2)), _write(tmp_path / "b", "", *_rows(5, 7), "  ", *_rows(5, 7))
    Path(a).write_bytes(b"\xef\xbb\xbf" + Path(a).read_bytes())
    assert _prompts(_load(a, heldout_path=b)) == (["0 + 0 =", "1 + 1 ="], ["5 + 5 =", "6 + 6 ="])


def test_missing_file_is_named_with_its_key(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.jsonl")
    assert _refused(missing) == (
        f"data.path must be a readable file of JSON lines, got {missing!r}: No such file or directory; check the path"
    )
    assert _refused(_write(tmp_path / "a", *_rows(0, 5)), heldout_path=missing) == (
        f"data.heldout_path must be a readable file of JSON lines, got {missing!r}: No such file or directory; "
        "check the path"
    )
    assert _refused(str(tmp_path)) == (
        f"data.path must be a readable file of JSON lines, got {str(tmp_path)!r}: Is a directory; check the path"
    )


def test_empty_file_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a", "", "  ")
    assert _refused(path) == f"data.path must hold at least one problem, got {path!r}, which is empty; check the path"


def test_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    assert _refused(str(tmp_path / "a")) == (
        f"data.path must be UTF-8 text, got {str(tmp_path / 'a')!r}: 'utf-8' codec can't decode byte 0xff in "
        "position 0: invalid start byte; convert the file"
    )


BROKEN = [
    (
        '{"prompt": "3", "answer"',
        'must be a JSON object, got \'{"prompt": "3", "answer"\' (Expecting \':\' delimiter at column 25); '
        "fix or remove the line",
    ),
    ('["3", "3"]', "must be a JSON object, got ['3', '3']; fix or remove the line"),
    (
        '{"prompt": "3", "solution": "3"}',
        "must have the key 'answer', got the keys 'prompt', 'solution'; set data.answer_key",
    ),
    ("{}", "must have the key 'prompt', got the keys none; set data.prompt_key"),
    ('{"prompt": "3", "answer": 3}', "must have a string as 'answer', got 3; put it in quotes"),
    ('{"prompt": null, "answer": "3"}', "must have a string as 'prompt', got None; put it in quotes"),
    ('{"prompt": "", "answer": "3"}', "must have a prompt that is not empty, got ''; fix or remove the line"),
]


@pytest.mark.parametrize(("line", "rest"), BROKEN)
def test_broken_line_is_refused_with_its_number(tmp_path: Path, line: str, rest: str) -> None:
    path = _write(tmp_path / "a", _rows(0, 1)[0], "", line)
    assert _refused(path) == f"data.path {path!r} line 3 {rest}"


def test_long_values_are_shortened_in_messages(tmp_path: Path) -> None:
    path = _write(tmp_path / "a", {"prompt": "3", "answer": list(range(100))})
    shown = repr(list(range(100)))[:57]
    assert (
        _refused(path) == f"data.path {path!r} line 1 must have a string as 'answer', got {shown}...; put it in quotes"
    )


def test_prompt_in_both_files_is_refused_with_both_lines(tmp_path: Path) -> None:
    a, b = _write(tmp_path / "a", *_rows(0, 5)), _write(tmp_path / "b", *_rows(7, 9), *_rows(4, 5))
    assert _refused(a, heldout_path=b) == (
        f"data.heldout_path must share no prompt with data.path, got line 3 of {b!r} equal to line 5 of {a!r}; "
        "remove one of the two"
    )


def test_fraction_that_leaves_a_split_empty_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a", *_rows(0, 1))
    assert _refused(path, heldout_fraction=1e-9) == (
        "data.heldout_fraction must leave a problem in either split, got 1e-09 which holds out 0 of 1; set another "
        "fraction, or data.heldout_path"
    )


def test_size_beyond_the_file_is_refused(tmp_path: Path) -> None:
    a, b = _write(tmp_path / "a", *_rows(0, 5)), _write(tmp_path / "b", *_rows(5, 8))
    assert _refused(a, heldout_path=b, train_size=6) == (
        "data.train_size must be at most the number of problems, got 6 but there are 5; lower it, or leave it empty "
        "for all"
    )
    assert _refused(a, heldout_path=b, heldout_size=4) == (
        "data.heldout_size must be at most the number of problems, got 4 but there are 3; lower it, or leave it empty "
        "for all"
    )
