"""Storage that goes away while a run writes to it: the run ends and says so, and goes on when it is back."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from actors.keeper import Keeper
from distrl.audit import Contract, audit
from distrl.errors import RunError
from distrl.ledger import Ledger
from distrl.storage import Folder
from tests.storage.server import KEYS, needs_server, s3_server_process
from tests.system.in_process import build

CONTRACT = Contract(tickets_per_step=2, max_staleness=1, finished=False)


@needs_server
def test_a_run_ends_with_the_cause_drops_nothing_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    directory = tmp_path / "run"
    directory.mkdir()
    with s3_server_process(tmp_path / "log") as (address, server):
        journal = Folder(address) / "outage" / "journal"

        async def first() -> None:
            system = build(directory, journal_in=journal)
            await system.coordinator.start()
            await system.learn(1)
            await system.checkpoint(1, version=1)
            os.kill(server.pid, signal.SIGSTOP)  # it accepts connections and answers nothing

            async def on() -> None:
                for step in (2, 3, 4):
                    await system.learn(step)

            with pytest.raises(RunError) as told:
                await on()
            assert str(told.value).startswith(f"journal file {journal}/")
            assert "cannot be written: " in str(told.value)
            assert str(told.value).endswith(
                "; see that storage.uri can be reached and written to, then go on with distrl resume"
            )
            assert system.ledger.counts()["dropped"] == 0
            system.ledger.close()

        async def second() -> None:
            system = build(directory, journal_in=journal)
            await system.coordinator.start()
            await system.restore(1)
            for step in (2, 3, 4):
                await system.learn(step)
            await system.coordinator.done.wait()
            await system.checkpoint(4, version=max(system.ledger.versions()))
            system.ledger.close()

        asyncio.run(asyncio.wait_for(first(), 120))
        os.kill(server.pid, signal.SIGCONT)
        asyncio.run(asyncio.wait_for(second(), 60))
        found = audit(directory / "ledger.sqlite", CONTRACT, journal)
        assert found.violations == ()
        assert found.tickets["committed"] == 8


def test_a_copy_of_the_ledger_that_cannot_be_written_is_said_and_the_checkpoint_stays(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.allocate_version(None, 0)
    ledger.commit_checkpoint("checkpoints/step-000001-v0", step=1, version=0, sha256="0" * 64)
    (tmp_path / "ledgers").write_text("a file is in the way")
    keeper = Keeper(tmp_path / "ledger.sqlite", Folder(tmp_path / "checkpoints"), Folder(tmp_path / "ledgers"))
    with pytest.raises(RunError) as told:
        keeper.copy_ledger("checkpoints/step-000001-v0")
    assert str(told.value) == (
        f"ledger copy {tmp_path}/ledgers/step-000001-v0.sqlite: cannot be written: File exists; the checkpoint "
        "checkpoints/step-000001-v0 is committed: make room or see that storage.uri can be reached, then go on with "
        "distrl resume"
    )
    last = ledger.last_checkpoint()
    assert last is not None
    assert last.step == 1

    (tmp_path / "ledgers").unlink()
    keeper.copy_ledger("checkpoints/step-000001-v0")
    copied = Ledger(tmp_path / "ledgers" / "step-000001-v0.sqlite")
    assert copied.last_checkpoint() == last
    copied.close()
    ledger.close()
