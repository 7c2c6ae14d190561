"""The tables of a report say what went into the run, recomputed from the numbers that the test put in."""

import json
import math
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models

from deploy.report.data import ReportData, learner_wait_fraction, read_run
from deploy.report.figures import staleness_counts
from deploy.report.page import render
from deploy.report.store import read_data, write_data
from deploy.report.tables import drops_by_length_table, drops_table, waits_table
from deploy.report.timeline import choose_window, clipped, overlap_s, spans_of
from deploy.report.write import write_report
from tests.report.runs import BEGAN_S, GROUP, STEP_S, SUMMARY, MadeRun, empty_run, fail, finish, make_run


def parquet(made: MadeRun, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(made.dir.path / "report" / f"{name}.parquet").to_pylist()
    return rows


def test_steps_parquet_has_the_rewards_with_their_standard_error_over_prompts(made: MadeRun) -> None:
    write_report(made.dir.path)
    rows = parquet(made, "steps")
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    for row in rows:
        drawn = [d for d in made.drawn if d.step == row["step"]]
        means = [sum(d.rewards) / GROUP for d in drawn]
        assert row["reward_mean"] == pytest.approx(statistics.mean(means))
        assert row["reward_standard_error"] == pytest.approx(statistics.stdev(means) / math.sqrt(len(means)))
        assert row["tickets"] == len(drawn)
        assert row["rollouts"] == len(drawn) * GROUP
        assert row["response_tokens"] == sum(sum(d.tokens) for d in drawn)
        assert row["staleness_max"] == max(d.staleness for d in drawn)


def test_steps_parquet_has_the_learner_s_metrics_and_seconds(made: MadeRun) -> None:
    write_report(made.dir.path)
    for row, report in zip(parquet(made, "steps"), made.reports, strict=True):
        assert {name: row[name] for name in report.metrics} == dict(report.metrics)
        assert (row["wait_s"], row["train_s"]) == (report.wait_s, report.train_s)
    # The record of a step says how long the one before took to publish.
    assert [r["publish_s"] for r in parquet(made, "steps")] == [0.25, 0.25, 0.25, None]


def test_a_metric_that_is_not_finite_is_null(tmp_path: Path) -> None:
    made = make_run(tmp_path, 3, metrics=[{"ratio_max": v} for v in (2.0, math.inf, math.nan)])
    assert read_run(made.dir.path).steps["ratio_max"].to_pylist() == [2.0, None, None]


def test_of_a_step_that_was_repeated_the_last_time_counts(made: MadeRun) -> None:
    lines = made.dir.metrics.read_text().splitlines()
    record = next(r for r in map(json.loads, lines) if r["kind"] == "step" and r["step"] == 2)
    made.dir.metrics.write_text("\n".join([*lines, json.dumps({**record, "reward_mean": 0.125}), ""]))
    steps = read_run(made.dir.path).steps.to_pylist()
    assert [(r["step"], r["reward_mean"]) for r in steps if r["step"] == 2] == [(2, 0.125)]


def test_evaluations_and_tickets_are_the_ledger_s(made: MadeRun) -> None:
    write_report(made.dir.path)
    assert [(r["step"], r["accuracy"]) for r in parquet(made, "evaluations")] == made.accuracies
    trained = [r for r in parquet(made, "tickets") if r["trained_step"] is not None]
    assert [(r["ticket_id"], r["trained_step"], r["staleness"]) for r in trained] == [
        (d.ticket_id, d.step, d.staleness) for d in made.drawn
    ]
    assert Counter(r["drop_reason"] for r in parquet(made, "tickets")) == {
        None: 12,
        "generation_failed": 1,
        "grading_failed": 2,
    }


def test_staleness_is_counted_per_rollout(made: MadeRun) -> None:
    expected = Counter({0: 0})
    for drawn in made.drawn:
        expected[drawn.staleness] += GROUP
    assert staleness_counts(read_run(made.dir.path).tickets) == dict(expected) == {0: 6, 1: 18}


def test_the_timeline_has_every_stage_of_every_ticket_and_the_learner(made: MadeRun) -> None:
    write_report(made.dir.path)
    rows = parquet(made, "timeline")
    ends_s = {d.ticket_id: BEGAN_S + STEP_S * d.step for d in made.drawn}
    for lane, start, end in (("generation", 5.5, 4), ("grading", 3.5, 3.25), ("reference", 3.0, 2.5)):
        found = {r["ticket_id"]: (r["started_s"], r["finished_s"]) for r in rows if r["lane"] == lane}
        assert found == {ticket: (at - start, at - end) for ticket, at in ends_s.items()}
    held_s = {3: 0.125}
    ended_s = {s: BEGAN_S + STEP_S * s - held_s.get(s, 0) for s in range(1, 5)}
    assert [(r["step"], r["started_s"], r["finished_s"]) for r in rows if r["lane"] == "train"] == [
        (s, at - 5, at) for s, at in ended_s.items()
    ]
    # From the end of a step's record to the ledger's time of its publication.
    assert [(r["step"], r["started_s"], r["finished_s"]) for r in rows if r["lane"] == "publish"] == [
        (s, BEGAN_S + STEP_S * s, BEGAN_S + STEP_S * s + 0.25)
        for s in range(1, 4)  # the fourth begins where the window ends
    ]


def test_the_shares_of_the_window_are_those_of_the_spans(made: MadeRun) -> None:
    data = read_run(made.dir.path)
    window = data.facts.window
    assert window is not None
    trained, sampled = (clipped(spans_of(data.timeline, lane), window) for lane in ("train", "generation"))
    # Each step: training from -5 to 0, of the third 0.125 earlier; generation from -5.5 to -4.
    assert overlap_s(trained, sampled) == pytest.approx(4 * 1.0 + 0.125)
    assert sum(e - s for s, e in sampled) == pytest.approx(4 * 1.5)


def test_a_window_of_large_batches_has_fewer_steps(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.report.timeline.WINDOW_TICKETS", 6)
    data = read_run(made.dir.path)
    window = choose_window(data.steps, data.tickets)
    assert window is not None
    assert (window.first_step, window.last_step) == (2, 3)


def test_samples_are_correct_and_wrong_rollouts_from_both_ends(made: MadeRun) -> None:
    write_report(made.dir.path)
    rows = parquet(made, "samples")
    rewards = {f"p{d.ticket_id}.0.{g}": (d, g) for d in made.drawn for g in range(GROUP)}
    for row in rows:
        drawn, g = rewards[row["rollout_id"]]
        assert row["reward"] == drawn.rewards[g]
        assert row["verdict"] == ("correct" if drawn.rewards[g] else "wrong")
        assert row["response"] == f"answer {row['rollout_id']}"
        assert row["response_tokens"] == drawn.tokens[g]
        assert (row["step"], row["staleness"]) == (drawn.step, drawn.staleness)
        assert row["prompt"] == f"7 {drawn.ticket_id}"
    assert Counter((r["when"], r["verdict"]) for r in rows) == {
        ("early", "correct"): 3,
        ("early", "wrong"): 3,
        ("late", "correct"): 3,
        ("late", "wrong"): 3,
    }
    assert {r["step"] for r in rows if r["when"] == "early"} <= {1, 2}
    assert {r["step"] for r in rows if r["when"] == "late"} <= {3, 4}


def test_prompts_are_decoded_by_the_tokenizer_of_the_run_s_checkpoint(made: MadeRun) -> None:
    folder = made.dir.checkpoints / "step-000004"
    folder.mkdir(parents=True)
    vocabulary = {f"w{i}": i for i in range(20)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(folder / "tokenizer.json"))
    data = read_run(made.dir.path)
    assert data.samples["prompt"].to_pylist()[0] == "w7 w0"
    assert not any("tokenizer" in note for note in data.facts.missing)


def test_a_run_directory_may_have_moved(made: MadeRun) -> None:
    before = read_run(made.dir.path)
    moved = made.dir.path.with_name("moved")
    shutil.move(made.dir.path, moved)
    after = read_run(moved)
    assert after.samples == before.samples
    assert after.timeline == before.timeline


def test_drops_are_told_by_reason_and_by_length(made: MadeRun) -> None:
    tickets = read_run(made.dir.path).tickets
    by_reason = drops_table(tickets)
    assert by_reason is not None
    trained = statistics.mean(sum(d.tokens) / GROUP for d in made.drawn)
    assert by_reason.rows == (
        ("trained, for comparison", "12", "12", f"{trained:.3g}", ""),
        ("generation_failed", "1", "0", "\N{EN DASH}", "it broke"),
        ("grading_failed", "2", "2", "7.5", "it broke"),
    )
    by_length = drops_by_length_table(tickets)
    assert by_length is not None
    assert sum(int(row[1]) for row in by_length.rows) == 14
    # Both were longer than anything that was trained.
    assert [int(row[2]) for row in by_length.rows][-1] == 2


def test_the_learner_s_waiting_is_that_of_its_records(made: MadeRun) -> None:
    later = sum(r.wait_s for r in made.reports[1:])
    busy = sum(r.train_s + r.last_publish_s for r in made.reports)
    assert learner_wait_fraction(read_run(made.dir.path).steps) == pytest.approx(later / (later + busy))


def test_who_was_waited_for_comes_from_the_summary(made: MadeRun) -> None:
    finish(made)
    rows = {row[0]: row[1].replace("\N{NO-BREAK SPACE}", " ") for row in waits_table(read_run(made.dir.path)).rows}
    assert rows["… of its waits, for generation"] == "1.5 s"
    assert rows["Generation: held back"] == "4 s"
    waited = sum(r.wait_s for r in made.reports)
    assert rows["… the rest"] == f"{waited - 1.75:.2g} s"


@pytest.mark.parametrize("state", ["open", "finished", "failed", "empty"])
def test_the_data_files_give_the_same_page(made: MadeRun, tmp_path: Path, state: str) -> None:
    if state == "empty":
        made = empty_run(tmp_path, **{"run.name": "empty"})
    if state == "finished":
        finish(made)
    if state == "failed":
        fail(made, "RunError: no")
    data = read_run(made.dir.path, clock=lambda: 5000.0)
    assert data.facts.state == state
    write_data(data, tmp_path / "data")
    again: ReportData = read_data(tmp_path / "data")
    assert again.facts == data.facts
    assert render(again) == render(data)


def test_a_finished_run_brings_its_summary(made: MadeRun) -> None:
    finish(made)
    facts = read_run(made.dir.path).facts
    assert facts.summary == SUMMARY
    assert not any("summary" in note for note in facts.missing)
