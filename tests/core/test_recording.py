"""What a recording consists of, and how a ledger accounts for what it replays."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from distrl.audit_replays import check_replays
from distrl.errors import LedgerError
from distrl.ledger import Ledger
from distrl.messages import JournalReceipt
from distrl.recording import read_recording
from distrl.tickets import Origin
from tests.builders import refusal
from tests.recorded import small_recording


def change(ledger: Path, sql: str) -> None:
    with sqlite3.connect(ledger) as db:
        db.execute(sql)
    db.close()


def test_what_the_ledger_names_is_replayed_in_order_and_what_was_dropped_or_given_up_is_not(tmp_path: Path) -> None:
    ledger = small_recording(tmp_path / "recorded", tickets=4)  # 0 was dropped, with its rows in the journal
    change(ledger, "UPDATE tickets SET state = 'committed' WHERE ticket_id = 2")
    change(ledger, "UPDATE tickets SET state = 'committed', journal_file = NULL WHERE ticket_id = 3")  # retired
    found = read_recording(ledger)
    assert (found.run, [t.ticket_id for t in found.tickets], found.left_out) == ("recorded", [1, 2, 4], 2)
    first = found.tickets[0]
    assert (first.prompt_id, first.rollouts, first.response_tokens, first.file) == ("prompt-1", 2, 5, "0.arrow")
    # Pass after pass in the same order.
    assert [found.at(n)[1] for n in range(5)] == [
        *(Origin("recorded", i, 0) for i in (1, 2, 4)),
        *(Origin("recorded", i, 1) for i in (1, 2)),
    ]


def test_a_recording_that_was_compacted_is_the_same_and_one_with_other_tickets_is_not(tmp_path: Path) -> None:
    ledger = small_recording(tmp_path / "recorded", tickets=3)
    before = read_recording(ledger)
    own = Ledger(ledger)
    moved = JournalReceipt(str(tmp_path / "recorded/journal/compact.arrow"), "ab" * 32, rows=6, bytes=1)
    own.compact_journal({moved: [1, 2, 3]}, [])
    compacted = read_recording(ledger)
    assert compacted.sha256 == before.sha256
    assert {t.file for t in compacted.tickets} == {"compact.arrow"}
    own.close()
    change(ledger, "UPDATE tickets SET redraw = 1 WHERE ticket_id = 2")
    assert read_recording(ledger).sha256 != before.sha256


def test_a_run_goes_on_with_the_recording_that_it_began_with_and_no_other(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.name_recording("a", 3, "1" * 64)
    ledger.name_recording("a", 3, "1" * 64)
    assert ledger.recordings() == {"a": 3}
    assert refusal(LedgerError, lambda: ledger.name_recording("a", 4, "2" * 64)) == (
        "replay.journal must be the recording that this run began with, 3 tickets of the run a (sha256 111111111111), "
        "got 4 tickets of a (sha256 222222222222); put the recorded run back as it was, or start a new run"
    )
    ledger.close()


def test_replays_are_counted_by_the_ledger_also_when_it_is_opened_again(tmp_path: Path) -> None:
    recording = read_recording(small_recording(tmp_path / "recorded", tickets=2))

    def at(position: int) -> tuple[str, Origin]:
        recorded, origin = recording.at(position)
        return recorded.prompt_id, origin

    def issue(ledger: Ledger) -> tuple[int, str, Origin]:
        draw, origin = ledger.issue_replay(at)
        return draw.ticket_id, draw.prompt_id, origin

    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.name_recording(recording.run, 2, recording.sha256)
    assert issue(ledger) == (0, "prompt-1", Origin("recorded", 1, 0))
    assert ledger.issue(lambda i: f"fresh-{i}").ticket_id == 1
    ledger.close()
    again = Ledger(tmp_path / "ledger.sqlite")
    assert issue(again) == (2, "prompt-2", Origin("recorded", 2, 0))
    assert issue(again) == (3, "prompt-1", Origin("recorded", 1, 1))
    assert again.replays() == {
        0: Origin("recorded", 1, 0),
        2: Origin("recorded", 2, 0),
        3: Origin("recorded", 1, 1),
    }
    with pytest.raises(sqlite3.IntegrityError):
        again.issue_replay(lambda position: at(0))
    assert len(again.replays()) == 3
    assert sum(again.counts().values()) == 4  # the refused one is no ticket
    again.close()


def test_a_ledger_of_before_has_no_replays(tmp_path: Path) -> None:
    ledger = small_recording(tmp_path / "recorded", tickets=1)
    change(ledger, "DROP TABLE replays")
    change(ledger, "DROP TABLE recordings")
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "recorded", copy)
    assert len(read_recording(copy / "ledger.sqlite").tickets) == 1


@pytest.mark.parametrize(
    ("origins", "expected"),
    [
        ([(1, 0), (2, 0), (1, 1)], []),
        (
            [(1, 0), (1, 0)],
            ["ticket 1 of a is replayed twice in pass 1, as tickets 0 and 1"],
        ),
        ([(2, 0), (1, 0)], ["ticket 1 of a is replayed after ticket 2"]),
        ([(1, 0), (1, 1)], ["pass 1 over a must have replayed its 2 tickets, got 1"]),
        (
            [(1, 0), (2, 0), (1, 1), (2, 1), (1, 2)],
            ["ticket 1 of a is replayed in pass 3, replay.epochs is 2"],
        ),
    ],
)
def test_the_audit_of_replays(origins: list[tuple[int, int]], expected: list[str]) -> None:
    given = {n: Origin("a", ticket, epoch) for n, (ticket, epoch) in enumerate(origins)}
    assert list(check_replays([{"ticket_id": n} for n in given], given, {"a": 2}, epochs=2)) == expected  # type: ignore[misc]


def test_a_replay_of_no_ticket_is_told() -> None:
    assert list(check_replays([], {3: Origin("a", 0, 0)}, {"a": 2}, epochs=1)) == [
        "ticket 3 is replayed, and was never issued"
    ]
