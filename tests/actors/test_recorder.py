"""The recorder: the file and the memory tell the same story."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import actors.recorder
from actors.recorder import Recorder
from distrl.messages import LoadReceipt, StepReport

REPORT = StepReport(step=3, wait_s=0.5, train_s=1.5, last_publish_s=0.25, metrics={"loss": 2.0}, held_s=0.125)


@pytest.fixture(name="path")
def metrics_path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture(name="recorder")
def open_recorder(path: Path) -> Iterator[Recorder]:
    times = iter(range(100, 200))
    recorder = Recorder(path, clock=lambda: float(next(times)))
    yield recorder
    recorder.close()


def test_each_record_has_a_number_a_time_and_a_kind_and_is_a_line_of_the_file_at_once(
    recorder: Recorder, path: Path
) -> None:
    recorder.event("failed", "disk full")
    recorder.load("generation-0", LoadReceipt(4, 0.5, 0.25, 7, moved_bytes=64, moved_tensors=2), "policy")
    recorder.evaluation({"name": "before", "accuracy": 0.5})
    recorder.published(4, 3, 0.75)

    expected = [
        {"number": 0, "time_s": 100.0, "kind": "failed", "message": "disk full"},
        {
            "number": 1,
            "time_s": 101.0,
            "kind": "load",
            "actor": "generation-0",
            "weights": "policy",
            "version": 4,
            "fetch_s": 0.5,
            "pause_s": 0.25,
            "sequences_in_flight": 7,
            "moved_bytes": 64,
            "moved_tensors": 2,
            "transport": "store",
            "fallback": None,
        },
        {"number": 2, "time_s": 102.0, "kind": "evaluation", "name": "before", "accuracy": 0.5},
        {"number": 3, "time_s": 103.0, "kind": "published", "version": 4, "step": 3, "publish_s": 0.75},
    ]
    assert recorder.after(-1) == expected
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected  # it is not closed yet


def test_a_step_has_the_batch_s_mean_reward_and_its_staleness(recorder: Recorder) -> None:
    recorder.step(REPORT, rewards=[0.0, 0.0, 1.0, 1.0], staleness=[0, 1, 3, 0], tokens=77)
    assert recorder.after(-1) == [
        {
            "number": 0,
            "time_s": 100.0,
            "kind": "step",
            "step": 3,
            "wait_s": 0.5,
            "train_s": 1.5,
            "last_publish_s": 0.25,
            "held_s": 0.125,
            "skipped": None,
            "metrics": {"loss": 2.0},
            "reward_mean": 0.5,
            "reward_standard_deviation": 0.5,
            "staleness_mean": 1.0,
            "staleness_max": 3,
            "staleness_counts": {"0": 2, "1": 1, "3": 1},
            "replayed": 0,
            "response_tokens": 77,
        }
    ]


def test_replayed_tickets_are_counted_and_have_no_part_in_the_staleness(recorder: Recorder) -> None:
    recorder.step(REPORT, rewards=[0.0, 1.0, 1.0], staleness=[None, 2, None], tokens=77)
    recorder.step(REPORT, rewards=[0.0, 1.0], staleness=[None, None], tokens=77)
    names = ("replayed", "staleness_mean", "staleness_max", "staleness_counts")
    mixed, offline = ({name: record[name] for name in names} for record in recorder.after(-1))
    assert mixed == {"replayed": 2, "staleness_mean": 2.0, "staleness_max": 2, "staleness_counts": {"2": 1}}
    assert offline == {"replayed": 2, "staleness_mean": None, "staleness_max": None, "staleness_counts": {}}


def test_one_asks_for_what_is_new(recorder: Recorder) -> None:
    for i in range(4):
        recorder.event("note", str(i))
    assert [r["message"] for r in recorder.after(1)] == ["2", "3"]
    assert recorder.after(3) == []


def test_memory_keeps_the_newest_and_the_file_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.recorder, "KEPT", 3)
    recorder = Recorder(path, clock=lambda: 0.0)
    for i in range(5):
        recorder.event("note", str(i))
    recorder.close()
    assert [r["number"] for r in recorder.after(-1)] == [2, 3, 4]
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]


def test_a_file_that_is_there_is_appended_to(path: Path) -> None:
    for message in ("first", "second"):
        recorder = Recorder(path, clock=lambda: 0.0)
        recorder.event("note", message)
        recorder.close()
    assert [json.loads(line)["message"] for line in path.read_text().splitlines()] == ["first", "second"]


def test_without_a_path_records_stay_in_memory() -> None:
    recorder = Recorder(None, clock=lambda: 1.0)
    recorder.event("note", "x")
    recorder.close()
    assert recorder.after(-1) == [{"number": 0, "time_s": 1.0, "kind": "note", "message": "x"}]
