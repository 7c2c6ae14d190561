"""Runs that are running, failed, empty or damaged still have a report; what is no run is refused by name."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import main
from deploy.exit_codes import EXIT_REFUSED
from deploy.report.data import read_run
from deploy.report.page import render
from deploy.report.write import write_report
from distrl.errors import LedgerError, RefusedError, RunError
from tests.builders import refusal
from tests.report.runs import MadeRun, empty_run, fail, finish, make_run

NO_SUMMARY = (
    "summary.json is not there: a run writes it when it finishes. For which stage the learner waited, and how long "
    "generation was held back, is known only then."
)
NO_TOKENIZER = "No tokenizer is there, neither in a checkpoint nor in model.path: prompts are shown as token ids."


def test_a_run_that_has_only_its_config_has_a_report(tmp_path: Path) -> None:
    written = write_report(empty_run(tmp_path).dir.path)
    assert written.data.facts.missing == [
        "metrics.jsonl is not there: no step has been recorded.",
        "ledger.sqlite is not there: nothing is known of tickets and evaluations.",
        NO_SUMMARY,
    ]
    page = written.page.read_text()
    for sentence in ("Nothing has been recorded yet", "No step has been recorded", "No evaluation has finished"):
        assert sentence in page
    assert written.headline()["heldout_accuracy_last"] is None


def test_a_run_without_a_step_has_a_report(tmp_path: Path) -> None:
    data = read_run(make_run(tmp_path, 0).dir.path)
    assert data.facts.state == "open"
    assert data.facts.missing == [NO_SUMMARY, "No optimizer step has been recorded."]
    assert "there is no time to show" in render(data)


def test_a_run_of_one_step_has_a_report(tmp_path: Path) -> None:
    data = read_run(make_run(tmp_path, 1).dir.path)
    assert data.steps.num_rows == 1
    assert "<svg" in render(data)


def test_a_running_run_is_read_while_its_ledger_and_its_metrics_are_written(made: MadeRun) -> None:
    with made.dir.metrics.open("a") as metrics, sqlite3.connect(made.dir.ledger, isolation_level=None) as db:
        metrics.write('{"number": 99, "kind": "st')  # half a line
        metrics.flush()
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE tickets SET state = 'committed'")
        data = read_run(made.dir.path, clock=lambda: 1060.5)
        db.execute("ROLLBACK")
    db.close()
    assert data.facts.missing == [NO_TOKENIZER, NO_SUMMARY]
    assert set(data.tickets["state"].to_pylist()) == {"trained", "dropped"}
    assert "The last sign of life came 20\N{NO-BREAK SPACE}s before this report" in render(data)


def test_a_failed_run_says_why(made: MadeRun) -> None:
    fail(made, "RunError: limits.drops_in_a_row: \ud800 at most 64")
    written = write_report(made.dir.path)
    assert written.headline()["state"] == "failed"
    assert "RunError: limits.drops_in_a_row: \\ud800 at most 64" in written.page.read_text()


def test_a_broken_line_and_a_lost_journal_file_are_named(made: MadeRun) -> None:
    finish(made)
    lines = made.dir.metrics.read_text().splitlines()
    made.dir.metrics.write_text("\n".join([lines[0], "{oops", *lines[1:], ""]))
    lost, damaged = sorted(made.dir.journal.iterdir())[3:5]
    lost.unlink()
    damaged.write_bytes(b"ARROW1 no")
    data = read_run(made.dir.path)
    assert data.facts.missing == [
        "metrics.jsonl, line 2 is not a record and was left out.",
        f"journal/{lost.name} cannot be read: its rollouts are left out.",
        f"journal/{damaged.name} cannot be read: its rollouts are left out.",
        NO_TOKENIZER,
    ]
    assert data.steps.num_rows == 4
    missing = {made.drawn[3].ticket_id, made.drawn[4].ticket_id}
    assert missing.isdisjoint(data.timeline["ticket_id"].to_pylist())


def test_a_config_of_another_version_is_shown_as_it_is(made: MadeRun) -> None:
    made.dir.config.write_text("train: {steps: 4}\nnovelty: {key: <b>}\n")
    assert "novelty: {key: &lt;b&gt;}" in render(read_run(made.dir.path))


def test_what_is_no_run_is_refused_with_the_run_nearby(tmp_path: Path) -> None:
    give = "give the folder that `distrl train` made, such as runs/NAME"
    path = tmp_path / "nothing"
    message = f"RUN: {path} must be a run directory, it does not exist; {give}"
    assert refusal(RefusedError, lambda: write_report(path)) == message

    path.mkdir()
    message = f"RUN: {path} must be a run directory, it has no run.json; {give}"
    assert refusal(RefusedError, lambda: write_report(path)) == message

    made = empty_run(tmp_path)
    file = tmp_path / "file"
    file.touch()
    message = f"RUN: {file} must be a run directory, it is a file; did you mean {made.dir.path}?"
    assert refusal(RefusedError, lambda: write_report(file)) == message
    message = f"RUN: {tmp_path} must be a run directory, it has no run.json; did you mean {made.dir.path}?"
    assert refusal(RefusedError, lambda: write_report(tmp_path)) == message


def test_a_newer_run_or_ledger_is_refused(made: MadeRun) -> None:
    with sqlite3.connect(made.dir.ledger) as db:
        db.execute("UPDATE meta SET value = '2' WHERE key = 'format'")
    db.close()
    message = f"ledger {made.dir.ledger}: format must be at most 1, got 2; use the distrl that wrote it"
    assert refusal(LedgerError, lambda: write_report(made.dir.path)) == message

    made.dir.run_json.write_text('{"format": 2}')
    message = f"RUN: {made.dir.run_json}: format must be at most 1, got 2; use the distrl that wrote it"
    assert refusal(RunError, lambda: write_report(made.dir.path)) == message


def test_damaged_files_are_refused(made: MadeRun) -> None:
    made.dir.summary.write_text("[1]")
    message = f"RUN: {made.dir.summary} must hold a JSON object, got list; restore it"
    assert refusal(RunError, lambda: write_report(made.dir.path)) == message
    made.dir.summary.write_text("{")
    message = (
        f"RUN: {made.dir.summary} must be readable JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1); restore it or name another run"
    )
    assert refusal(RunError, lambda: write_report(made.dir.path)) == message
    made.dir.summary.unlink()
    for path in made.dir.path.glob("ledger.sqlite-*"):
        path.unlink()
    made.dir.ledger.write_bytes(b"this is no database, but it is long enough to be read as one" * 40)
    message = f"ledger {made.dir.ledger} must be readable: file is not a database; restore it from a copy"
    assert refusal(LedgerError, lambda: write_report(made.dir.path)) == message


def test_a_report_that_cannot_be_written_leaves_the_one_before(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_report(made.dir.path).page
    before = page.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    message = f"RUN: the report must be writable in {made.dir.path}: No space left on device; make room or permit it"
    assert refusal(RunError, lambda: write_report(made.dir.path)) == message
    assert page.read_bytes() == before


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    monkeypatch.setattr("sys.argv", ["distrl", "report", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def test_the_command_says_where_the_report_is_and_what_is_missing(
    made: MadeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(made)
    code, out, err = call(monkeypatch, capsys, str(made.dir.path))
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{made.dir.path}/report.html: run finished, 4 steps, held-out accuracy 0.500 +- 0.125",
        f"{made.dir.path}/report: steps.parquet, evaluations.parquet, tickets.parquet, timeline.parquet, "
        "samples.parquet",
        f"missing: {NO_TOKENIZER}",
    ]


def test_the_command_s_json_has_paths_and_headline_numbers(
    made: MadeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, capsys, str(made.dir.path), "--json")
    said = json.loads(out)
    assert code == 0
    assert Path(said["report"]).is_file()
    assert all(Path(path).is_file() for path in said["tables"].values())
    headline = said["headline"]
    assert (headline["state"], headline["steps"], headline["rollouts_trained"]) == ("open", 4, 24)
    assert (headline["heldout_accuracy_first"], headline["heldout_accuracy_last"]) == (0.25, 0.5)
    assert (headline["max_staleness"], headline["tickets_issued"], headline["tickets_dropped"]) == (1, 15, 3)


def test_the_command_refuses_what_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(monkeypatch, capsys, str(tmp_path / "no"))
    assert (code, out) == (EXIT_REFUSED, "")
    assert err == (
        f"RefusedError: RUN: {tmp_path}/no must be a run directory, it does not exist; "
        "give the folder that `distrl train` made, such as runs/NAME\n"
    )
