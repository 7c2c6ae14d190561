"""Full, read-only and lying disks: what is said, and that the last good state is still there."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deploy import control
from deploy.audit import audit_run
from deploy.checkpoints import last_checkpoint
from deploy.run import resumable
from deploy.run_dir import RunDir, create_run_dir, write_json
from deploy.run_state import claim
from distrl.audit import Contract, audit
from distrl.config import make_config
from distrl.errors import LedgerError, RefusedError, RunError
from distrl.ledger import Ledger
from learners.checkpoint import TrainState, checkpoint_sha256, load_checkpoint
from tests.builders import refusal
from tests.learners.test_checkpoint import save_checkpoint, save_tokenizer, snapshot, train, trained
from tests.system.in_process import InProcessRun, build, states, until


class Mounted:
    """A file system of its own, in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mount("tmpfs", "-t", "tmpfs", "-o", "size=160k")

    def _mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments[1:], arguments[0], str(self.path)], check=True, capture_output=True)

    def options(self, options: str) -> None:
        self._mount("tmpfs", "-o", f"remount,{options}")

    def fill(self) -> None:
        with (self.path / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 512)
            except OSError:
                pass

    def free(self) -> None:
        (self.path / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mounted]:
    try:
        made = Mounted(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this process may not mount a file system")
    yield made
    subprocess.run(["umount", "-l", str(made.path)], check=True)


async def learn_on(system: InProcessRun, first: int, last: int) -> None:
    for step in range(first, last + 1):
        await system.learn(step)


def finish(directory: Path, steps: int) -> None:
    """Goes on from the checkpoint of step 1, to the end."""

    async def scenario() -> None:
        system = build(directory, steps=steps)
        await system.coordinator.start()
        await system.restore(1)
        await learn_on(system, 2, steps)
        await system.coordinator.done.wait()
        await system.checkpoint(steps, version=max(system.ledger.versions()))
        system.ledger.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))
    found = audit(directory / "ledger.sqlite", Contract(tickets_per_step=2, max_staleness=1, finished=True))
    assert found.violations == ()
    assert found.tickets["committed"] == 2 * steps


def test_a_full_disk_under_the_journal_ends_the_run_and_drops_nothing(tmp_path: Path, disk: Mounted) -> None:
    run = tmp_path / "run"
    (run / "journal").parent.mkdir()
    (run / "journal").symlink_to(disk.path)

    async def until_it_is_full() -> str:
        system = build(run, steps=40)
        await system.coordinator.start()
        await system.learn(1)
        await system.checkpoint(1, version=1)
        disk.fill()
        with pytest.raises(RunError) as error:
            await learn_on(system, 2, 40)
        assert "dropped" not in states(system)
        system.ledger.close()
        return str(error.value)

    message = asyncio.run(asyncio.wait_for(until_it_is_full(), 30))
    assert message.startswith(f"journal file {run}/journal/")
    assert message.endswith(
        ".arrow: cannot be written: No space left on device; make room, then go on with distrl resume"
    )
    disk.free()
    disk.options("size=8m")
    finish(run, 4)


def test_a_full_disk_under_the_ledger_ends_the_run_and_keeps_what_was_committed(disk: Mounted) -> None:
    disk.options("size=400k")

    async def until_it_is_full() -> str:
        system = build(disk.path, steps=40)
        await system.coordinator.start()
        await system.learn(1)
        await system.checkpoint(1, version=1)
        disk.fill()
        with pytest.raises((LedgerError, RunError)) as error:
            await learn_on(system, 2, 40)
        system.ledger.close()
        return str(error.value)

    message = asyncio.run(asyncio.wait_for(until_it_is_full(), 30))
    ledger_full = (
        f"ledger {disk.path}/ledger.sqlite: database or disk is full; make room, then go on with distrl resume"
    )
    # Which of the two meets the full disk first is a matter of bytes.
    assert message == ledger_full or (
        message.startswith(f"journal file {disk.path}/journal/") and "No space left on device; make room" in message
    )
    disk.free()
    disk.options("size=8m")
    finish(disk.path, 4)


def test_the_ledger_itself_says_that_the_disk_is_full_and_goes_on_when_there_is_room(disk: Mounted) -> None:
    disk.options("size=400k")
    ledger = Ledger(disk.path / "ledger.sqlite")
    ledger.allocate_version(None, 0)
    disk.fill()

    def issue_on() -> None:
        while True:
            ledger.issue(lambda ticket_id: "p" * 500)

    assert refusal(LedgerError, issue_on) == (
        f"ledger {disk.path}/ledger.sqlite: database or disk is full; make room, then go on with distrl resume"
    )
    issued = ledger.counts()["issued"]
    disk.free()
    assert ledger.issue(lambda ticket_id: "prompt").ticket_id == issued
    ledger.close()


def test_a_checkpoint_onto_a_full_disk_fails_with_the_cause_and_leaves_the_one_before(disk: Mounted) -> None:
    disk.options("size=8m")
    model, optimizer = trained(seed=0, steps=1)
    before, after = disk.path / "step-000001", disk.path / "step-000002"
    sha256 = save_checkpoint(before, model, optimizer, TrainState(1, 1), save_tokenizer)
    expected = snapshot(model, optimizer)
    train(model, optimizer, 1)
    used = sum(path.stat().st_blocks * 512 for path in before.rglob("*"))

    said = set()
    # Room for nothing of it, for the training state alone, and for nearly all of it.
    for room in (8 << 10, used // 2, used - (24 << 10), used - (16 << 10), used - (8 << 10)):
        disk.options(f"size={used + room}")
        attempt = refusal(RunError, lambda: save_checkpoint(after, model, optimizer, TrainState(2, 2), save_tokenizer))
        assert attempt.startswith(f"checkpoint {after}: cannot be written: ")
        assert attempt.endswith("; make room, then go on with distrl resume")
        said.add(attempt.removeprefix(f"checkpoint {after}: cannot be written: ").partition(";")[0])
        assert [path.name for path in disk.path.iterdir()] == [before.name]  # its room is free again
        assert checkpoint_sha256(before) == sha256
    # safetensors has an error of its own.
    assert said <= {
        "No space left on device",
        "SafetensorError: Error while serializing: I/O error: No space left on device (os error 28)",
    }
    assert "No space left on device" in said

    other, its_optimizer = trained(seed=1, steps=3)
    assert load_checkpoint(before, other, its_optimizer) == TrainState(1, 1)
    found = snapshot(other, its_optimizer)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    disk.options("size=8m")
    save_checkpoint(after, model, optimizer, TrainState(2, 2), save_tokenizer)


def finished_run(folder: Path) -> RunDir:
    """A run of four steps with two checkpoints of real files."""
    values = {
        "run": {"dir": str(folder), "name": "run"},
        "model": {"path": str(folder)},
        "data": {"source": "sort_digits"},
        "train": {"steps": 8, "tickets_per_step": 2, "max_staleness": 1},
    }
    run_dir = create_run_dir(make_config(values))

    async def scenario() -> None:
        system = build(run_dir.path, steps=8)
        await system.coordinator.start()
        for step in (1, 2):
            await system.learn(step)
            path = run_dir.checkpoints / f"step-{step:06d}"
            path.mkdir(parents=True)
            (path / "model.safetensors").write_bytes(bytes([step]) * 4096)
            torch.save({"step": step}, path / "optimizer.pt")
            await system.coordinator.commit_checkpoint(str(path), step, step, checkpoint_sha256(path))
        await until(lambda: states(system).get("ready", 0) >= 2)
        await system.coordinator.request_stop()
        assert await system.coordinator.next_batch(3) is None
        system.ledger.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))
    write_json(run_dir.run_json, {"format": 1, "name": "run", "state": "stopped"})
    return run_dir


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_is_refused_before_anything_starts_and_the_one_before_is_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    run_dir = finished_run(tmp_path)
    last, before = run_dir.checkpoints / "step-000002", run_dir.checkpoints / "step-000001"
    whole = checkpoint_sha256(last)
    assert resumable(run_dir.path)[2] == str(last)
    damage(last / name)
    ledger_bytes = run_dir.ledger.read_bytes()

    assert refusal(RunError, lambda: resumable(run_dir.path)) == (
        f"checkpoint {last}: must have sha256 {whole}, got {checkpoint_sha256(last)}: its files were damaged; put back "
        f"a copy of it, or begin a new run with model.path={before}, which is whole (step 1)"
    )
    assert run_dir.ledger.read_bytes() == ledger_bytes
    assert [v.rule for v in audit_run(run_dir.path).violations] == ["checkpoints"]


def test_a_checkpoint_that_is_gone_is_said(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path)
    for name in ("step-000001", "step-000002"):
        shutil.rmtree(run_dir.checkpoints / name)
    assert refusal(RunError, lambda: resumable(run_dir.path)) == (
        f"checkpoint {run_dir.checkpoints / 'step-000002'}: must be there, the run's ledger names it; put back a copy "
        "of it"
    )


def test_a_checkpoint_that_a_crash_left_before_the_ledger_named_it_does_not_exist(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path)
    shutil.copytree(run_dir.checkpoints / "step-000002", run_dir.checkpoints / "step-000003")
    assert last_checkpoint(run_dir) == str(run_dir.checkpoints / "step-000002")
    assert audit_run(run_dir.path).violations == ()


def test_where_nothing_can_be_written_a_run_is_neither_made_nor_gone_on_with_but_read(disk: Mounted) -> None:
    disk.options("size=8m")
    run_dir = finished_run(disk.path)
    disk.options("ro")
    config = make_config(
        {"run": {"dir": str(disk.path), "name": "new"}, "model": {"path": "m"}, "data": {"source": "sort_digits"}}
    )
    assert refusal(RunError, lambda: create_run_dir(config)) == (
        f"run.dir: {disk.path / 'new'} cannot be made: Read-only file system"
    )
    assert refusal(RunError, lambda: claim(run_dir)) == (
        f"{run_dir.lock}: must be writable: Read-only file system; mend the run's directory"
    )
    assert audit_run(run_dir.path).violations == ()
    assert control.run_status(run_dir.path)["checkpoint"] == str(run_dir.checkpoints / "step-000002")
    disk.options("rw")


def test_a_second_driver_in_another_process_is_refused_and_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path)
    code = (
        "import sys\nfrom pathlib import Path\nfrom deploy.run_dir import RunDir\nfrom deploy.run_state import claim\n"
        f"claim(RunDir(Path({str(run_dir.path)!r})))\nprint('claimed', flush=True)\nsys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert first.stdin is not None
    assert first.stdout is not None
    assert first.stdout.readline() == b"claimed\n"
    assert refusal(RefusedError, lambda: claim(run_dir)) == (
        f"{run_dir.path}: the run must not be running, process {first.pid} runs it"
    )
    first.kill()
    first.wait()
    first.stdin.close()
    first.stdout.close()
    os.close(claim(run_dir))
