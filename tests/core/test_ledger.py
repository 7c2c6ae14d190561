"""The ledger: allowed moves happen, refused ones change nothing, and the file can be read by anybody."""

import itertools
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import distrl.ledger
from distrl.errors import FencedError, LedgerError
from distrl.ledger import Checkpoint, Ledger, LedgerReader
from distrl.messages import JournalReceipt
from distrl.staleness import Version
from distrl.tickets import TRANSITIONS, DropReason, ReturnCause, TicketState
from tests.builders import refusal

S = TicketState
FILE = JournalReceipt("journal/1.arrow", "ab" * 32, rows=4, bytes=1000)
CLOCK = itertools.count(1000)


@pytest.fixture(name="path")
def ledger_path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture(name="ledger")
def open_ledger(path: Path) -> Iterator[Ledger]:
    ledger = Ledger(path, clock=lambda: float(next(CLOCK)))
    for version in range(3):
        ledger.allocate_version(version - 1 if version else None, 0)
    yield ledger
    ledger.close()


def dump(path: Path) -> list[str]:
    """Everything that another process sees in the file."""
    db = sqlite3.connect(path)
    try:
        return list(db.iterdump())
    finally:
        db.close()


def rows(path: Path, query: str) -> list[dict[str, Any]]:
    db = sqlite3.connect(path)
    db.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in db.execute(query)]
    finally:
        db.close()


def issue(ledger: Ledger) -> int:
    return ledger.issue(lambda ticket_id: f"prompt-{ticket_id}")[0]


MOVES: Mapping[TicketState, Callable[[Ledger, int], object]] = {
    S.GENERATED: lambda ledger, i: ledger.mark_generated(i, versions=[0, 2], rollouts=4, response_tokens=30),
    S.READY: lambda ledger, i: ledger.mark_ready(i, journal_file=FILE, reward_mean=0.25),
    S.TRAINED: lambda ledger, i: ledger.mark_trained(3, {i: 2}, parent=0),
    S.COMMITTED: lambda ledger, i: ledger.commit_checkpoint(f"step-{i}", step=3, version=0, sha256="cd" * 32),
    S.DROPPED: lambda ledger, i: ledger.drop(i, DropReason.GRADING_FAILED, "no number in the answer"),
}
WAYS: Mapping[TicketState, tuple[TicketState, ...]] = {
    S.ISSUED: (),
    S.GENERATED: (S.GENERATED,),
    S.READY: (S.GENERATED, S.READY),
    S.TRAINED: (S.GENERATED, S.READY, S.TRAINED),
    S.COMMITTED: (S.GENERATED, S.READY, S.TRAINED, S.COMMITTED),
    S.DROPPED: (S.DROPPED,),
}


def ticket_in(ledger: Ledger, state: TicketState) -> int:
    ticket_id = issue(ledger)
    for step in WAYS[state]:
        MOVES[step](ledger, ticket_id)
    return ticket_id


@pytest.mark.parametrize("state", list(S))
def test_every_state_is_reached_and_counted(ledger: Ledger, state: TicketState) -> None:
    ticket_id = ticket_in(ledger, state)
    assert ledger.state(ticket_id) is state
    assert ledger.counts() == {s.value: int(s is state) for s in S}


@pytest.mark.parametrize(
    ("old", "new"), list(itertools.product(S, [S.GENERATED, S.READY, S.TRAINED, S.DROPPED])), ids=str
)
def test_an_allowed_move_happens_and_a_forbidden_one_changes_nothing(
    ledger: Ledger, path: Path, old: TicketState, new: TicketState
) -> None:
    ticket_id = ticket_in(ledger, old)
    ledger_before = dump(path)
    if old == new == S.TRAINED:  # the learner tells it again, when an answer was lost
        MOVES[new](ledger, ticket_id)
        assert dump(path) == ledger_before
        return
    if new in TRANSITIONS[old]:
        MOVES[new](ledger, ticket_id)
        assert ledger.state(ticket_id) is new
        return
    allowed = ", ".join(sorted(TRANSITIONS[old])) or "nothing: it is final"
    assert refusal(LedgerError, lambda: MOVES[new](ledger, ticket_id)) == (
        f"ticket 0 cannot go from {old.value} to {new.value}; from {old.value} it may go to {allowed}"
    )
    assert dump(path) == ledger_before


@pytest.mark.parametrize("move", [S.GENERATED, S.READY, S.TRAINED, S.DROPPED])
def test_a_ticket_that_was_never_issued_is_refused(ledger: Ledger, path: Path, move: TicketState) -> None:
    before = dump(path)
    assert refusal(LedgerError, lambda: MOVES[move](ledger, 5)) == "ticket 5 is not in the ledger"
    assert dump(path) == before


def test_a_ticket_s_whole_way_is_on_disk(ledger: Ledger, path: Path) -> None:
    ticket_id = issue(ledger)
    ledger.count_attempt(ticket_id, "generation", "it hiccupped")
    ledger.count_attempt(ticket_id, "grading", "no number")
    for state in (S.GENERATED, S.READY, S.TRAINED, S.COMMITTED):
        MOVES[state](ledger, ticket_id)

    (row,) = rows(path, "SELECT * FROM tickets")
    times = [row.pop(name) for name in ("issued_s", "generated_s", "ready_s")]
    assert times == sorted(times)
    assert row == {
        "ticket_id": 0,
        "redraw": 0,
        "prompt_id": "prompt-0",
        "state": "committed",
        "attempts": 2,
        "oldest_version": 0,
        "newest_version": 2,
        "rollouts": 4,
        "response_tokens": 30,
        "reward_mean": 0.25,
        "journal_file": FILE.path,
        "trained_step": 3,
        "staleness": 2,
        "checkpoint": "step-0",
        "drop_reason": None,
        "drop_detail": None,
    }
    (file,) = rows(path, "SELECT path, sha256, rows, bytes FROM journal_files")
    assert JournalReceipt(**file) == FILE


def test_a_drop_keeps_its_reason_and_detail(ledger: Ledger, path: Path) -> None:
    ledger.drop(issue(ledger), DropReason.JOURNAL_FAILED, "disk full")
    ledger.drop(issue(ledger), DropReason.RUN_ENDED, "")
    ledger.drop(issue(ledger), DropReason.RUN_ENDED, "")

    assert ledger.drops() == {"journal_failed": 1, "run_ended": 2}
    assert rows(path, "SELECT drop_reason, drop_detail FROM tickets WHERE ticket_id = 0") == [
        {"drop_reason": "journal_failed", "drop_detail": "disk full"}
    ]


def test_tickets_are_numbered_in_order_and_the_prompt_is_drawn_for_that_number(ledger: Ledger) -> None:
    assert [ledger.issue(lambda i: f"prompt-{i * i}") for _ in range(3)] == [
        (0, "prompt-0", 0),
        (1, "prompt-1", 0),
        (2, "prompt-4", 0),
    ]


def test_a_prompt_that_cannot_be_drawn_issues_nothing(ledger: Ledger, path: Path) -> None:
    before = dump(path)

    def broken(ticket_id: int) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ledger.issue(broken)
    assert dump(path) == before
    assert issue(ledger) == 0


def test_several_tickets_share_a_journal_file(ledger: Ledger, path: Path) -> None:
    for _ in range(3):
        ticket_in(ledger, S.READY)
    assert len(rows(path, "SELECT * FROM journal_files")) == 1
    assert {r["journal_file"] for r in rows(path, "SELECT journal_file FROM tickets")} == {FILE.path}


def test_a_batch_with_one_ticket_that_is_not_ready_trains_none(ledger: Ledger, path: Path) -> None:
    good, bad = ticket_in(ledger, S.READY), ticket_in(ledger, S.GENERATED)
    before = dump(path)

    assert refusal(LedgerError, lambda: ledger.mark_trained(1, {good: 0, bad: 0}, parent=0)) == (
        f"ticket {bad} cannot go from generated to trained; from generated it may go to dropped, issued, ready"
    )
    assert dump(path) == before


def test_a_checkpoint_commits_the_tickets_up_to_its_step_and_no_others(ledger: Ledger, path: Path) -> None:
    tickets = [ticket_in(ledger, S.READY) for _ in range(5)]
    for step, ticket_id in enumerate(tickets[:4], start=1):
        ledger.mark_trained(step, {ticket_id: 0}, parent=0)

    assert ledger.commit_checkpoint("step-2", step=2, version=0, sha256="ef" * 32) == 2
    assert [ledger.state(i).value for i in tickets] == ["committed", "committed", "trained", "trained", "ready"]
    assert ledger.commit_checkpoint("step-4", step=4, version=0, sha256="ef" * 32) == 2
    named = rows(path, "SELECT checkpoint FROM tickets ORDER BY ticket_id")
    assert [r["checkpoint"] for r in named] == ["step-2", "step-2", "step-4", "step-4", None]


def test_a_checkpoint_of_an_unknown_version_is_not_named_and_commits_nothing(ledger: Ledger, path: Path) -> None:
    ticket_in(ledger, S.TRAINED)
    before = dump(path)
    with pytest.raises(sqlite3.IntegrityError):
        ledger.commit_checkpoint("step-3", step=3, version=9, sha256="ef" * 32)
    assert dump(path) == before
    assert ledger.last_checkpoint() is None


def test_a_checkpoint_that_fails_half_way_is_not_named_and_commits_nothing(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ticket_in(ledger, S.TRAINED), ticket_in(ledger, S.TRAINED)
    before = dump(path)
    check = distrl.ledger.check_transition

    def fail_at_the_second(ticket_id: int, old: TicketState, new: TicketState) -> None:
        check(ticket_id, old, new)
        if ticket_id == second:
            assert ledger.state(first) is S.COMMITTED  # inside the transaction
            raise OSError("disk full")

    monkeypatch.setattr(distrl.ledger, "check_transition", fail_at_the_second)
    with pytest.raises(OSError, match="disk full"):
        ledger.commit_checkpoint("step-3", step=3, version=0, sha256="ef" * 32)
    assert dump(path) == before


def path_of(checkpoint: Checkpoint | None) -> str | None:
    return None if checkpoint is None else checkpoint.path


def test_the_last_checkpoint_is_the_one_committed_last_even_if_the_clock_went_back(tmp_path: Path) -> None:
    times = iter([1.0, 1000.0, 5000.0, 3000.0])
    ledger = Ledger(tmp_path / "ledger.sqlite", clock=lambda: next(times))
    version = ledger.allocate_version(None, 0)
    for name in ("a", "b", "c"):
        ledger.commit_checkpoint(name, step=1, version=version, sha256="ef" * 32)
        assert path_of(ledger.last_checkpoint()) == name
    ledger.close()


def test_a_checkpoint_of_a_rolled_back_run_is_the_last_one_though_its_step_is_lower(ledger: Ledger) -> None:
    assert ledger.last_checkpoint() is None
    ledger.commit_checkpoint("step-40", step=40, version=0, sha256="ef" * 32)
    ledger.commit_checkpoint("step-20-again", step=20, version=0, sha256="ef" * 32)
    assert path_of(ledger.last_checkpoint()) == "step-20-again"


def test_version_numbers_are_never_used_again_also_after_reopening(path: Path) -> None:
    ledger = Ledger(path)
    assert [ledger.allocate_version(None if i == 0 else i - 1, i) for i in range(3)] == [0, 1, 2]
    ledger.close()

    again = Ledger(path)
    assert again.versions() == {0: Version(0, None, 0), 1: Version(1, 0, 1), 2: Version(2, 1, 2)}
    assert again.allocate_version(1, 1) == 3  # rolled back to step 1: the step repeats, the number does not
    assert again.allocate_version(3, 2) == 4
    assert again.versions()[3] == Version(3, 1, 1)
    again.close()


def test_a_version_needs_a_known_parent(ledger: Ledger, path: Path) -> None:
    before = dump(path)
    with pytest.raises(sqlite3.IntegrityError):
        ledger.allocate_version(7, 1)
    assert dump(path) == before


def test_tickets_go_on_where_they_were_after_reopening(path: Path) -> None:
    ledger = Ledger(path)
    states = [S.ISSUED, S.READY, S.DROPPED]
    for _ in range(3):
        ledger.allocate_version(None, 0)
    tickets = [ticket_in(ledger, state) for state in states]
    ledger.close()

    again = Ledger(path)
    assert [again.state(i) for i in tickets] == states
    assert issue(again) == 3
    again.close()


def test_only_an_allocated_version_can_be_published(ledger: Ledger, path: Path) -> None:
    assert refusal(LedgerError, lambda: ledger.mark_published(3, "00" * 32)) == (
        "version 3 cannot be published: the ledger did not allocate it"
    )
    ledger.mark_published(0, "11" * 32)
    (row,) = rows(path, "SELECT manifest_sha256, published_s > 0 AS timed FROM versions WHERE version = 0")
    assert row == {"manifest_sha256": "11" * 32, "timed": 1}


def test_a_newer_format_is_refused_by_name_and_the_file_stays_as_it_was(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
    db.execute("INSERT INTO meta VALUES ('format', '2')")
    db.execute("CREATE TABLE draws (draw INTEGER PRIMARY KEY)")
    db.commit()
    db.close()
    before = dump(path)

    assert refusal(LedgerError, lambda: Ledger(path)) == (
        f"ledger {path}: format must be at most 1, got 2; use the distrl that wrote it"
    )
    assert dump(path) == before


def test_the_file_carries_its_format(ledger: Ledger, path: Path) -> None:
    assert rows(path, "SELECT value FROM meta WHERE key = 'format'") == [{"value": "1"}]


def test_a_reader_sees_the_last_transaction_while_the_next_one_is_open(ledger: Ledger, path: Path) -> None:
    issue(ledger)
    seen = []

    def read_meanwhile(ticket_id: int) -> str:
        reader = sqlite3.connect(path, timeout=0)  # a lock would raise at once
        seen.extend(reader.execute("SELECT ticket_id, state FROM tickets").fetchall())
        reader.close()
        return "prompt"

    ledger.issue(read_meanwhile)
    assert seen == [(0, "issued")]
    assert rows(path, "PRAGMA journal_mode") == [{"journal_mode": "wal"}]


def test_counts_sum_to_the_tickets_ever_issued(ledger: Ledger) -> None:
    for state in (S.ISSUED, S.READY, S.READY, S.TRAINED, S.DROPPED):
        ticket_in(ledger, state)
    assert ledger.counts() == {
        "issued": 1,
        "generated": 0,
        "ready": 2,
        "trained": 1,
        "committed": 0,
        "dropped": 1,
    }


def test_max_staleness_is_the_largest_that_was_trained(ledger: Ledger) -> None:
    assert ledger.max_staleness() == 0
    tickets = [ticket_in(ledger, S.READY) for _ in range(3)]
    ledger.mark_trained(1, {tickets[0]: 1, tickets[1]: 3}, parent=0)
    ledger.mark_trained(2, {tickets[2]: 2}, parent=0)
    assert ledger.max_staleness() == 3


def test_evaluations_come_back_in_order(ledger: Ledger) -> None:
    evaluation = {
        "name": "before",
        "step": 0,
        "oldest_version": 0,
        "newest_version": 0,
        "problems": 16,
        "responses": 16,
        "failed": 1,
        "accuracy": 0.25,
        "standard_error": 0.1,
        "reward_mean": 0.25,
    }
    ledger.record_evaluation(evaluation)
    ledger.record_evaluation(evaluation | {"name": "after", "step": 9})

    found = ledger.evaluations()
    assert [(r["evaluation"], r["name"], r["step"]) for r in found] == [(1, "before", 0), (2, "after", 9)]
    assert {k: v for k, v in found[0].items() if k not in ("evaluation", "finished_s")} == evaluation


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", clock=lambda: 7.0)
    ledger.allocate_version(None, 0)
    common = {"name": "during", "oldest_version": 0, "newest_version": 0, "problems": 4, "responses": 4, "failed": 0}
    given_up = []
    for step, accuracy in ((10, 0.25), (20, 0.5), (30, 0.5), (40, 0.25), (50, 0.75), (60, None)):
        ledger.commit_checkpoint(f"step-{step}", step=step, version=0, sha256="0" * 64)
        if accuracy is not None:
            numbers = {"step": step, "accuracy": accuracy, "standard_error": 0.1, "reward_mean": accuracy}
            ledger.record_evaluation({**common, **numbers})
        given_up += [c.step for c in ledger.remove_checkpoints(keep=2)]
    # 30 is the best until 50 comes, the later of two equals; 50 is both best and among the newest at the end.
    assert given_up == [10, 20, 30, 40]
    assert [c.step for c in ledger.checkpoints()] == [50, 60]
    removed = ledger._db.execute("SELECT step, removed_s FROM checkpoints WHERE removed_s IS NOT NULL").fetchall()
    assert [tuple(row) for row in removed] == [(10, 7.0), (20, 7.0), (30, 7.0), (40, 7.0)]


def test_without_an_evaluation_only_the_newest_are_kept(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.allocate_version(None, 0)
    for step in (1, 2, 3):
        ledger.commit_checkpoint(f"step-{step}", step=step, version=0, sha256="0" * 64)
    assert [c.step for c in ledger.remove_checkpoints(keep=1)] == [1, 2]
    assert [c.step for c in ledger.remove_checkpoints(keep=1)] == []


def test_whoever_opens_a_ledger_fences_the_one_who_had_it(path: Path) -> None:
    zombie = Ledger(path, owner="the first coordinator")
    zombie.allocate_version(None, 0)
    ticket_id = issue(zombie)
    owner = Ledger(path, owner="the second coordinator")
    before = dump(path)

    message = (
        f"ledger {path}: only its owner may write, which is the second coordinator with epoch 2; this process has "
        "epoch 1 and must end"
    )
    writes: list[Callable[[], object]] = [
        lambda: issue(zombie),
        lambda: zombie.allocate_version(0, 1),
        lambda: zombie.drop(ticket_id, DropReason.RUN_ENDED, ""),
        lambda: zombie.count_attempt(ticket_id, "grading", "x"),
        lambda: zombie.commit_checkpoint("step-0", step=0, version=0, sha256="00" * 32),
        lambda: zombie.take_up(),
        lambda: zombie.roll_back(0),
    ]
    for write in writes:
        assert refusal(FencedError, write) == message
    assert dump(path) == before
    assert zombie.state(ticket_id) is S.ISSUED  # it may still look
    owner.drop(ticket_id, DropReason.RUN_ENDED, "")
    zombie.close()
    owner.close()


def test_a_reader_changes_neither_the_file_nor_its_owner(ledger: Ledger, path: Path) -> None:
    issue(ledger)
    before = dump(path)
    with LedgerReader(path) as reader:
        assert reader.counts()["issued"] == 1
        assert reader.epoch() == 1
        with pytest.raises(LedgerError, match="attempt to write a readonly database"):
            reader.rows("DELETE FROM tickets")
    assert dump(path) == before
    issue(ledger)  # not fenced


def test_a_ledger_that_is_not_there_is_not_made_by_a_reader(path: Path) -> None:
    assert refusal(LedgerError, lambda: LedgerReader(path)) == (
        f"ledger {path}: must be there, the file does not exist; name the directory of a run"
    )
    assert not path.exists()


@pytest.mark.parametrize("open_it", [Ledger, LedgerReader])
def test_a_file_that_is_no_ledger_is_said(path: Path, open_it: Callable[[Path], object]) -> None:
    path.write_bytes(b"something else altogether, and long enough to be a header of SQLite" * 20)
    assert refusal(LedgerError, lambda: open_it(path)) == (
        f"ledger {path}: file is not a database; name the directory of a run; if it is one, the file was overwritten"
    )


def test_a_ledger_that_another_process_has_locked_is_said_after_the_wait(ledger: Ledger, path: Path) -> None:
    ledger._db.execute("PRAGMA busy_timeout = 10")
    ledger._lock_s = 0.01
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert refusal(LedgerError, lambda: issue(ledger)) == (
        f"ledger {path}: database is locked; another process has held it for 0.01 s; end that process (fuser names "
        "it), then go on with distrl resume"
    )
    holder.execute("ROLLBACK")
    holder.close()
    assert issue(ledger) == 0


def test_a_failed_call_is_counted_with_stage_and_cause_and_only_for_a_ticket_that_there_is(
    ledger: Ledger, path: Path
) -> None:
    ledger.count_attempt(issue(ledger), "grading", "no number")
    assert rows(path, "SELECT ticket_id, redraw, stage, detail FROM failures") == [
        {"ticket_id": 0, "redraw": 0, "stage": "grading", "detail": "no number"}
    ]
    assert refusal(LedgerError, lambda: ledger.count_attempt(7, "grading", "no number")) == (
        "ticket 7 is not in the ledger"
    )


@pytest.mark.parametrize(("state", "redraw"), [(S.ISSUED, True), (S.GENERATED, False), (S.READY, True)])
def test_a_ticket_that_is_returned_is_the_same_prompt_and_forgets_what_was_sampled(
    ledger: Ledger, path: Path, state: TicketState, redraw: bool
) -> None:
    ticket_id = ticket_in(ledger, state)
    draw = ledger.return_ticket(ticket_id, ReturnCause.TOO_STALE, redraw=redraw)
    assert draw == (ticket_id, "prompt-0", int(redraw))
    assert ledger.state(ticket_id) is S.ISSUED
    assert rows(path, "SELECT journal_file, oldest_version, rollouts, reward_mean, redraw FROM tickets") == [
        {"journal_file": None, "oldest_version": None, "rollouts": None, "reward_mean": None, "redraw": int(redraw)}
    ]
    assert rows(path, "SELECT redraw, old_state, new_state, cause FROM returns") == [
        {"redraw": 0, "old_state": state.value, "new_state": "issued", "cause": "too_stale"}
    ]
    for move in (S.GENERATED, S.READY):
        MOVES[move](ledger, ticket_id)


@pytest.mark.parametrize("state", [S.TRAINED, S.COMMITTED, S.DROPPED])
def test_what_was_trained_or_dropped_is_not_returned(ledger: Ledger, path: Path, state: TicketState) -> None:
    ticket_id = ticket_in(ledger, state)
    before = dump(path)
    if state is not S.TRAINED:
        with pytest.raises(LedgerError, match=f"ticket 0 cannot go from {state.value} to issued"):
            ledger.return_ticket(ticket_id, ReturnCause.TOO_STALE, redraw=True)
        assert dump(path) == before


def test_recovery_says_of_every_ticket_why_it_went_back(ledger: Ledger, path: Path) -> None:
    for state in (S.COMMITTED, S.ISSUED, S.GENERATED, S.READY, S.DROPPED):
        ticket_in(ledger, state)
    trained = ticket_in(ledger, S.READY)
    ledger.mark_trained(4, {trained: 0}, parent=0)

    recovery = ledger.take_up()
    assert [t.ticket_id for t in recovery.ready] == [3]
    assert [t.versions for t in (*recovery.ready, *ledger.roll_back(3))] == [(0, 2), (0, 2)]
    assert ledger.state(trained) is S.READY
    assert recovery.issued == ((1, "prompt-1", 0), (2, "prompt-2", 0))
    assert rows(path, "SELECT ticket_id, old_state, new_state, cause FROM returns ORDER BY ticket_id") == [
        {"ticket_id": 1, "old_state": "issued", "new_state": "issued", "cause": "restart"},
        {"ticket_id": 2, "old_state": "generated", "new_state": "issued", "cause": "restart"},
        {"ticket_id": trained, "old_state": "trained", "new_state": "ready", "cause": "rollback"},
    ]


def test_a_step_that_is_told_again_makes_no_second_version_and_one_that_is_done_again_does(ledger: Ledger) -> None:
    tickets = {ticket_in(ledger, S.READY): 0, ticket_in(ledger, S.READY): 1}
    made = ledger.mark_trained(1, tickets, parent=0)
    assert ledger.versions()[made] == Version(made, 0, 1)
    assert ledger.mark_trained(1, tickets, parent=0) == made

    ledger.roll_back(0)
    again = ledger.mark_trained(1, tickets, parent=0)
    assert again == made + 1


def test_naming_a_checkpoint_again_changes_nothing(ledger: Ledger, path: Path) -> None:
    version = ledger.mark_trained(1, {ticket_in(ledger, S.READY): 0}, parent=0)
    assert ledger.commit_checkpoint("step-1", step=1, version=version, sha256="00" * 32) == 1
    before = dump(path)
    assert ledger.commit_checkpoint("step-1", step=1, version=version, sha256="00" * 32) == 0
    assert dump(path) == before


def test_a_run_that_goes_on_knows_its_last_step_and_the_version_in_use(ledger: Ledger) -> None:
    assert (ledger.trained_step(), ledger.last_published()) == (0, 0)
    tickets = {ticket_in(ledger, S.READY): 0}
    ledger.mark_published(ledger.mark_trained(1, tickets, parent=0), "00" * 32)
    published = ledger.last_published()
    ledger.mark_trained(2, {ticket_in(ledger, S.READY): 0}, parent=published)
    assert (ledger.trained_step(), ledger.last_published()) == (2, published)
    ledger.roll_back(0)
    assert ledger.trained_step() == 0
