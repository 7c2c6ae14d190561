"""The journal: what it answers for is in the file, complete, under the hash that it gave."""

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import actors.journal
from actors.journal import Journal, write_file
from distrl.errors import RunError, SchemaError, StageError
from distrl.messages import JournalReceipt
from distrl.rollouts import join
from distrl.schema import SCHEMAS, Stage
from distrl.storage import Folder
from tests.builders import generation_batch, grading_batch, reference_batch, refusal, run

LATER_S = 1e6
"""No timer of a test goes off."""


def stages(ticket_id: int, reference: bool = True) -> tuple[pa.RecordBatch, pa.RecordBatch, pa.RecordBatch | None]:
    generation = generation_batch(ticket_id, (2, 3))
    return generation, grading_batch(generation), reference_batch(generation) if reference else None


def read(path: str | Path) -> pa.Table:
    with pa.ipc.open_file(str(path)) as reader:
        return reader.read_all()


def files(directory: Path) -> list[str]:
    return sorted(p.suffix for p in directory.iterdir())


async def append_all(journal: Journal, *tickets: int) -> list[Any]:
    return await asyncio.gather(*(journal.append(*stages(i)) for i in tickets), return_exceptions=True)


@pytest.fixture(name="short", autouse=True)
def short_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.journal, "FLUSH_S", 0.001)


@pytest.mark.parametrize("reference", [True, False])
def test_the_file_holds_the_join_and_the_receipt_describes_it(tmp_path: Path, reference: bool) -> None:
    receipt: JournalReceipt = run(Journal(tmp_path / "journal").append(*stages(4, reference)))

    data = Path(receipt.path).read_bytes()
    assert receipt.sha256 == hashlib.sha256(data).hexdigest()
    assert (receipt.rows, receipt.bytes) == (2, len(data))
    table = read(receipt.path)
    assert table.schema.equals(SCHEMAS[Stage.JOURNAL], check_metadata=True)
    assert table.to_pylist() == join(*stages(4, reference)).to_pylist()
    assert files(tmp_path / "journal") == [".arrow"]


def test_tickets_that_come_together_share_one_file(tmp_path: Path) -> None:
    receipts = run(append_all(Journal(tmp_path), 0, 1, 2))

    assert len(set(receipts)) == 1
    assert receipts[0].rows == 6
    assert read(receipts[0].path).to_pylist() == [row for i in (0, 1, 2) for row in join(*stages(i)).to_pylist()]


def test_a_full_buffer_is_written_without_waiting_for_the_timer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors.journal, "FLUSH_S", LATER_S)
    monkeypatch.setattr(actors.journal, "FLUSH_BYTES", join(*stages(0)).nbytes + 1)
    receipts = run(append_all(Journal(tmp_path), 0, 1, 2, 3))  # two fill a buffer, twice

    assert [r.path for r in receipts] == [receipts[0].path] * 2 + [receipts[2].path] * 2
    assert [read(r.path)["ticket_id"].to_pylist() for r in receipts[::2]] == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_a_restarted_journal_overwrites_nothing(tmp_path: Path) -> None:
    first = run(append_all(Journal(tmp_path, clock=lambda: 1000.0), 0))
    second = run(append_all(Journal(tmp_path, clock=lambda: 1000.5), 1))

    assert read(first[0].path)["ticket_id"].to_pylist() == [0, 0]
    assert read(second[0].path)["ticket_id"].to_pylist() == [1, 1]
    assert Path(first[0].path).name < Path(second[0].path).name


def test_one_answers_only_when_the_file_and_its_name_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def watch(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real(fd)

    monkeypatch.setattr(os, "fsync", watch)
    journal = Journal(tmp_path / "journal")
    receipt: JournalReceipt = run(journal.append(*stages(0)))
    assert synced == [Path(receipt.path).name + ".partial", "journal"]


def test_a_disk_that_refuses_is_an_error_for_everyone_who_waits_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refuse = os.fsync, True

    def full(fd: int) -> None:
        if refuse:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)

    async def scenario() -> None:
        nonlocal refuse
        journal = Journal(tmp_path)
        found = await append_all(journal, 0, 1)
        assert [type(e) for e in found] == [RunError] * 2
        for error in found:
            assert str(error).startswith(f"journal file {tmp_path}/")
            assert str(error).endswith(
                ".arrow: cannot be written: No space left on device; make room, then go on with distrl resume"
            )
        assert ".arrow" not in files(tmp_path)  # nothing has the name of a complete file

        refuse = False
        (receipt,) = await append_all(journal, 1)
        assert read(receipt.path)["ticket_id"].to_pylist() == [1, 1]
        assert files(tmp_path).count(".arrow") == 1

    run(scenario())


def test_a_directory_that_vanished_is_an_error_for_everyone_who_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        journal = Journal(tmp_path / "journal")
        (tmp_path / "journal").rmdir()
        (tmp_path / "journal").write_text("a file in its place")
        found = await append_all(journal, 0, 1)
        assert [type(e) for e in found] == [RunError] * 2
        assert all("cannot be written: Not a directory; " in str(e) for e in found)

    run(scenario())


def test_a_ticket_with_a_missing_grade_is_refused_and_the_others_are_written(tmp_path: Path) -> None:
    async def scenario() -> None:
        journal = Journal(tmp_path)
        generation, grading, reference = stages(0)
        bad, good = await asyncio.gather(
            journal.append(generation, grading.slice(1), reference), journal.append(*stages(1)), return_exceptions=True
        )
        assert isinstance(bad, SchemaError)
        assert str(bad) == "grading batch: every generated rollout must be there; rollout p0.0.0 is not among 1 rows"
        assert isinstance(good, JournalReceipt)
        assert read(good.path)["ticket_id"].to_pylist() == [1, 1]

    run(scenario())


def test_one_who_gives_up_waiting_does_not_keep_the_others_from_the_disk(tmp_path: Path) -> None:
    async def scenario() -> None:
        journal = Journal(tmp_path)
        quitter = asyncio.create_task(journal.append(*stages(0)))
        waiter = asyncio.create_task(journal.append(*stages(1)))
        await asyncio.sleep(0)
        quitter.cancel()
        assert set(read((await waiter).path)["ticket_id"].to_pylist()) >= {1}

    run(scenario())


def test_a_ticket_that_is_sent_again_stands_once_in_the_file(tmp_path: Path) -> None:
    async def scenario() -> None:
        journal = Journal(tmp_path)
        first = asyncio.create_task(journal.append(*stages(0)))
        await asyncio.sleep(0)
        first.cancel()  # its caller has given up
        again, other = await append_all(journal, 0, 1)
        assert again == other
        assert read(again.path)["rollout_id"].to_pylist() == ["p0.0.0", "p0.0.1", "p1.0.0", "p1.0.1"]

    run(scenario())


@pytest.mark.parametrize("found", ["1", "3"])
def test_a_file_of_another_format_is_refused_by_name_and_number(tmp_path: Path, found: str) -> None:
    rows = join(*stages(0))
    other = rows.schema.with_metadata({**rows.schema.metadata, b"distrl.format": found.encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, other) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(rows.columns, schema=other))
    path = tmp_path / "old.arrow"
    path.write_bytes(sink.getvalue())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert refusal(SchemaError, lambda: run(Journal(tmp_path).read(str(path), sha256, 0, 0))) == (
        f"journal file {path}: format must be 2, got {found}; use the distrl that wrote it"
    )


def test_of_two_draws_of_a_ticket_in_a_file_only_the_one_that_is_asked_for_is_read(tmp_path: Path) -> None:
    first = join(*stages(0))
    at = first.schema.names.index("redraw")
    again = first.set_column(at, first.schema.field(at), pa.array([1, 1], type=first.schema.field(at).type))
    written = write_file(Folder(tmp_path), "both.arrow", [first, again])

    def read_draw(redraw: int) -> list[int]:
        count, rows = run(Journal(tmp_path).read(written.path, written.sha256, 0, redraw))
        assert count == rows.num_rows
        found: list[int] = rows.column("redraw").to_pylist()
        return found

    assert (read_draw(0), read_draw(1)) == ([0, 0], [1, 1])
    assert refusal(StageError, lambda: read_draw(2)) == (
        f"journal file {tmp_path / 'both.arrow'}: must hold draw 2 of ticket 0, the ledger says so; it does not"
    )
