"""The audit finds nothing in a real run, and finds by name whatever is broken in its ledger, journal or checkpoints."""

import asyncio
import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from deploy.run_dir import RunDir, write_json
from distrl.audit import Audit, Contract, audit
from distrl.errors import StageError
from distrl.ledger_reader import LedgerReader
from distrl.sampling import SampleRequest
from distrl.storage import Folder
from distrl.tickets import ReturnCause, TicketState
from tests.deploy.commands import call
from tests.system.in_process import build, ticket_of

CONTRACT = Contract(tickets_per_step=2, max_staleness=1, finished=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, cut by a crash after the second, in which a call fails and a ticket is poison."""
    directory = tmp_path_factory.mktemp("done")
    failed: list[int] = []

    def fail(request: SampleRequest) -> BaseException | None:
        if ticket_of(request) == 1 or (ticket_of(request) == 2 and not failed):
            failed.append(0)
            return StageError("the engine hiccupped")
        return None

    async def first() -> None:
        system = build(directory, fail=fail)
        await system.coordinator.start()
        await system.learn(1)
        await system.checkpoint(1, version=1)
        await system.learn(2)
        system.ledger.close()  # a crash: nothing is told to anybody

    async def second() -> None:
        system = build(directory)
        await system.coordinator.start()
        await system.restore(1)
        for step in (2, 3, 4):
            last = await system.learn(step)
        assert last.step == 4
        await system.coordinator.done.wait()
        await system.checkpoint(4, version=max(system.ledger.versions()))
        system.ledger.close()

    asyncio.run(asyncio.wait_for(first(), 20))
    asyncio.run(asyncio.wait_for(second(), 20))
    return directory


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


def look(directory: Path, contract: Contract = CONTRACT) -> Audit:
    return audit(directory / "ledger.sqlite", contract, Folder(directory / "journal"))


def change(directory: Path, *statements: str) -> None:
    db = sqlite3.connect(directory / "ledger.sqlite")
    for statement in statements:
        assert db.execute(statement).rowcount > 0, statement
    db.commit()
    db.close()


def test_a_run_with_a_crash_a_failed_call_and_a_poison_ticket_breaks_no_rule(done: Path) -> None:
    before = (done / "ledger.sqlite").read_bytes()
    found = look(done)
    assert found.violations == ()
    assert (found.tickets["committed"], found.steps, found.committed_steps, found.abandoned_steps) == (8, 4, 4, 1)
    assert sum(found.staleness.values()) == 8
    assert found.drops["generation_failed"] == 1
    assert found.failed_calls["generation"] >= 2
    assert found.returned["rollback"] == 2
    assert {r["cause"] for r in found.reissued} <= {"restart", "too_stale", "abandoned_branch"}
    assert found.epochs == 2
    assert (done / "ledger.sqlite").read_bytes() == before


def test_drops_and_waits_are_told_by_length_and_difficulty(done: Path) -> None:
    found = look(done).selection
    for shares in (found.by_length, found.by_difficulty):
        assert sum(s.trained for s in shares.values()) == 8
        assert sum(n for s in shares.values() for n in s.dropped.values()) == sum(look(done).drops.values())
        assert sum(s.waited_s for s in shares.values()) > 0
    assert found.by_length["unknown"].dropped["generation_failed"] == 1  # never sampled, and nobody else had its prompt
    assert set(found.by_difficulty) == {"0.5", "unknown"}  # half of every group is right


BREAKS: dict[str, tuple[str, ...]] = {
    "versions": ("UPDATE versions SET step = step + 2 WHERE version = (SELECT MAX(version) FROM versions)",),
    "order": ("DELETE FROM tickets WHERE ticket_id = 1",),
    "finished": ("UPDATE tickets SET state = 'ready', drop_reason = NULL WHERE ticket_id = 1",),
    "drops": ("UPDATE tickets SET drop_reason = NULL WHERE ticket_id = 1",),
    "redraws": ("UPDATE tickets SET redraw = 1 WHERE ticket_id = 0",),
    "trained_once": (
        "INSERT INTO trainings SELECT ticket_id, (SELECT MAX(version) FROM trainings), 0 FROM tickets"
        " WHERE state = 'committed' AND trained_step = 1 LIMIT 1",
    ),
    "committed": ("UPDATE tickets SET checkpoint = NULL WHERE trained_step = 3",),
    "batches": ("DELETE FROM trainings WHERE ticket_id = 0",),
    "staleness": ("UPDATE tickets SET staleness = staleness + 1 WHERE ticket_id = 0",),
    "journal": ("UPDATE tickets SET reward_mean = 0 WHERE ticket_id = 0",),
}


@pytest.mark.parametrize("rule", BREAKS)
def test_what_is_broken_in_the_ledger_is_found_by_name(copy: Path, rule: str) -> None:
    change(copy, *BREAKS[rule])
    assert rule in {v.rule for v in look(copy).violations}


def test_a_bound_that_was_broken_is_found_though_the_ledger_says_the_truth(done: Path) -> None:
    strict = look(done, Contract(tickets_per_step=2, max_staleness=0, finished=True))
    assert {v.rule for v in strict.violations} == {"staleness"}
    assert strict.violations[0].detail.endswith("was trained with staleness 1, train.max_staleness is 0")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "said"), [(_flip, "it was damaged"), (_cut, "it was damaged"), (Path.unlink, "cannot be read: No such")]
)
def test_a_damaged_or_missing_journal_file_is_found(copy: Path, damage: Callable[[Path], None], said: str) -> None:
    db = sqlite3.connect(copy / "ledger.sqlite")
    (name,) = db.execute("SELECT journal_file FROM tickets WHERE ticket_id = 0").fetchone()
    db.close()
    damage(copy / "journal" / Path(name).name)
    (violation,) = look(copy).violations
    assert violation.rule == "journal"
    assert said in violation.detail
    assert Path(name).name in violation.detail


def test_a_damaged_checkpoint_is_found(done: Path) -> None:
    found = audit(
        done / "ledger.sqlite",
        CONTRACT,
        Folder(done / "journal"),
        checkpoint_sha256=lambda name: "1" * 64,
    )
    assert [v.detail for v in found.violations] == [
        f"checkpoint {name} must have sha256 {'0' * 64}, got {'1' * 64}; it was damaged"
        for name in ("step-1", "step-4")
    ]


def test_the_command_exits_with_1_and_names_the_rule(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = RunDir(copy)
    run_dir.config.write_text("train: {tickets_per_step: 2, max_staleness: 1, on_stale: wait}\n")
    write_json(run_dir.run_json, {"format": 1, "name": "copy", "state": "finished"})
    change(copy, "UPDATE checkpoints SET removed_s = 1")
    assert call(monkeypatch, "audit", str(copy)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no rule is broken"

    change(copy, "UPDATE tickets SET state = 'trained', checkpoint = NULL WHERE ticket_id = 0")
    assert call(monkeypatch, "audit", str(copy)) == 1
    assert "VIOLATION finished: ticket 0 must be committed or dropped, it is trained" in capsys.readouterr().out
    assert call(monkeypatch, "audit", str(copy), "--json") == 1
    violations = json.loads(capsys.readouterr().out)["violations"]
    assert {"rule": "finished", "detail": "ticket 0 must be committed or dropped, it is trained"} in violations


def test_a_run_without_a_ledger_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "run.json", {"format": 1, "name": "x", "state": "created"})
    assert call(monkeypatch, "audit", str(tmp_path)) == 2
    assert capsys.readouterr().err == (
        f"RefusedError: {tmp_path}: the run must have a ledger to be audited; it ended before it had begun\n"
    )


QUERIES = re.findall(r"```sql\n(.*?)```", (Path(__file__).parents[2] / "docs/ledger.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("query", QUERIES, ids=range(len(QUERIES)))
def test_a_query_of_the_page_about_the_ledger_has_an_answer(done: Path, query: str) -> None:
    with LedgerReader(done / "ledger.sqlite") as ledger:
        assert ledger.rows(query)


def test_the_page_about_the_ledger_has_every_table_state_and_cause(done: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/ledger.md").read_text()
    with LedgerReader(done / "ledger.sqlite") as ledger:
        tables = {r["name"] for r in ledger.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
    listed = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert listed == tables | set(TicketState) | set(ReturnCause)


def test_the_journal_is_read_as_the_page_says(done: Path) -> None:
    rollouts = ds.dataset(str(done / "journal"), format="ipc").to_table(columns=["ticket_id", "redraw", "reward"])
    with LedgerReader(done / "ledger.sqlite") as ledger:
        committed = {r["ticket_id"] for r in ledger.rows("SELECT ticket_id FROM tickets WHERE state = 'committed'")}
    assert committed <= set(rollouts["ticket_id"].to_pylist())
