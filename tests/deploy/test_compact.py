"""Compacting keeps what the ledger names, deletes the rest, and changes nothing where it fails."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

import deploy.compact
from actors.journal import Journal
from deploy.audit import audit_run
from deploy.compact import compact_run
from deploy.run_dir import RunDir
from deploy.run_state import RunState, claim, read_state
from deploy.ui.index import Filter, RolloutIndex, open_index
from distrl.errors import LedgerError, RefusedError, RunError
from distrl.ledger import Ledger, LedgerReader
from distrl.storage import Folder
from tests.builders import generation_batch, grading_batch, refusal, run
from tests.deploy.commands import call
from tests.system.test_bad_luck_on_disk import finished_run


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A stopped run with four committed tickets, some that are ready, and a file that the ledger does not name."""
    made = finished_run(tmp_path)
    (made.journal / "left-by-a-crash.partial").write_bytes(b"x" * 100)
    return made


def contents(run_dir: RunDir) -> list[dict[str, object]]:
    """Every rollout that the ledger names, in the order of their ids."""
    with LedgerReader(run_dir.ledger) as ledger:
        names = {r["journal_file"]: 0 for r in ledger.rows("SELECT journal_file FROM tickets WHERE journal_file <> ''")}
        tickets = {r["ticket_id"] for r in ledger.rows("SELECT ticket_id FROM tickets WHERE journal_file <> ''")}
    rows = [row for name in names for row in pa.ipc.open_file(name).read_all().to_pylist()]
    return sorted((r for r in rows if r["ticket_id"] in tickets), key=lambda r: r["rollout_id"])


def test_all_rollouts_that_count_are_kept_in_one_file_and_the_audit_agrees(run_dir: RunDir) -> None:
    before = contents(run_dir)
    found = compact_run(run_dir.path, drop_committed=False)
    assert contents(run_dir) == before
    assert len(before) >= 8
    files = list(run_dir.journal.iterdir())
    assert (found.files_after, found.bytes_after, found.retired) == (1, files[0].stat().st_size, 0)
    assert len(files) == 1
    assert found.files_before >= 2
    assert audit_run(run_dir.path).violations == ()
    assert read_state(run_dir) == RunState.STOPPED

    again = compact_run(run_dir.path, drop_committed=False)
    assert (again.files_after, contents(run_dir)) == (1, before)


def test_committed_rollouts_go_on_request_and_the_others_stay(run_dir: RunDir) -> None:
    before = contents(run_dir)
    found = compact_run(run_dir.path, drop_committed=True)
    with LedgerReader(run_dir.ledger) as ledger:
        committed = {r["ticket_id"] for r in ledger.rows("SELECT ticket_id FROM tickets WHERE state = 'committed'")}
    assert found.retired == len(committed) == 4
    assert contents(run_dir) == [r for r in before if r["ticket_id"] not in committed]
    assert audit_run(run_dir.path).violations == ()


def test_files_end_at_their_size(run_dir: RunDir) -> None:
    assert compact_run(run_dir.path, drop_committed=False, file_bytes=1).files_after >= 2
    assert audit_run(run_dir.path).violations == ()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "said"), [(_flip, "the file was damaged"), (Path.unlink, "must be readable, the ledger names it")]
)
def test_a_damaged_file_stops_it_before_anything_changes(
    run_dir: RunDir, damage: Callable[[Path], None], said: str
) -> None:
    with LedgerReader(run_dir.ledger) as ledger:
        name = ledger.rows("SELECT journal_file FROM tickets WHERE ticket_id = 0")[0]["journal_file"]
    damage(Path(name))
    files = sorted(run_dir.journal.iterdir())
    assert said in refusal(RunError, lambda: compact_run(run_dir.path, drop_committed=False))
    assert sorted(run_dir.journal.iterdir()) == files
    with LedgerReader(run_dir.ledger) as ledger:
        assert ledger.rows("SELECT journal_file FROM tickets WHERE ticket_id = 0")[0]["journal_file"] == name


def test_a_crash_before_the_old_files_are_deleted_costs_nothing(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run_dir)

    def die(folder: Folder, name: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "delete", die)
        patched.setattr(deploy.compact, "release", lambda run_dir, lock, state: os.close(lock))
        with pytest.raises(KeyboardInterrupt):
            compact_run(run_dir.path, drop_committed=False)
    values = json.loads(run_dir.run_json.read_text())
    run_dir.run_json.write_text(json.dumps({**values, "state": "stopped"}))
    assert audit_run(run_dir.path).violations == ()
    assert compact_run(run_dir.path, drop_committed=False).files_after == 1
    assert len(list(run_dir.journal.iterdir())) == 1
    assert contents(run_dir) == before


def test_a_running_run_is_refused(run_dir: RunDir) -> None:
    lock = claim(run_dir)
    assert refusal(RefusedError, lambda: compact_run(run_dir.path, drop_committed=True)) == (
        f"{run_dir.path}: the run must not be running, process {os.getpid()} runs it"
    )
    os.close(lock)


def test_rollouts_that_are_still_needed_are_not_given_up(run_dir: RunDir) -> None:
    ledger = Ledger(run_dir.ledger)
    (ready, *_) = [r["ticket_id"] for r in ledger.rows("SELECT ticket_id FROM tickets WHERE state = 'ready'")]
    assert refusal(LedgerError, lambda: ledger.compact_journal({}, [ready])) == (
        f"ticket {ready} must be committed to give up its rollouts, it is ready"
    )
    ledger.close()


def test_the_command_says_what_it_did(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "compact", str(run_dir.path), "--drop-committed") == 0
    assert "the rollouts of 4 committed tickets were given up" in capsys.readouterr().out


def test_a_journal_over_its_budget_refuses_names_the_remedy_and_writes_nothing(tmp_path: Path) -> None:
    async def scenario() -> str:
        generation = generation_batch(0, (2, 3))
        first = await Journal(tmp_path).append(generation, grading_batch(generation), None)
        journal = Journal(tmp_path, budget_bytes=first.bytes + 10)  # what an earlier process wrote counts
        more = generation_batch(1, (2, 3))
        with pytest.raises(RunError) as error:
            await journal.append(more, grading_batch(more), None)
        return str(error.value).replace(str(first.bytes + 10), "LIMIT").replace(str(first.bytes), "HAS")

    message = run(scenario())
    assert message.startswith(
        f"limits.journal_bytes: the journal {tmp_path} must not grow beyond LIMIT bytes, it has HAS and "
    )
    assert message.endswith(
        " more to write; run distrl compact, or raise the limit in the run's config.yaml, then go on with distrl resume"
    )
    assert len(list(tmp_path.iterdir())) == 1


def test_the_index_of_rollouts_forgets_what_was_deleted_and_finds_the_rest_in_its_new_file(run_dir: RunDir) -> None:
    index = open_index(run_dir)
    before = index.refresh()
    rows, matching = index.find(Filter(), limit=1000)
    assert matching == before
    committed = sum(row["state"] == "committed" for row in rows)
    assert 0 < committed < before

    compact_run(run_dir.path, drop_committed=False)
    kept = index.refresh()
    assert committed <= kept <= before  # those of tickets that were dropped or sampled again go
    _check_files(run_dir, index)
    compact_run(run_dir.path, drop_committed=True)
    assert index.refresh() == kept - committed
    _check_files(run_dir, index)
    assert all(row["state"] != "committed" for row in index.find(Filter(), limit=1000)[0])
    index.close()


def _check_files(run_dir: RunDir, index: RolloutIndex) -> None:
    for row in index.find(Filter(), limit=1000)[0]:
        found = index.one(row["rollout_id"])
        assert found is not None
        assert Path(found["file"]).is_file()
        assert Path(found["file"]).parent == run_dir.journal
