"""A run whose journal and checkpoints lie in object storage: killed, its directory lost, put back, and gone on with."""

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import put_back as module
from deploy.attempt import resume_or_start
from deploy.audit import audit_run
from deploy.checkpoints import last_checkpoint, local_checkpoint, remove_unnamed
from deploy.compact import compact_run
from deploy.export import export
from deploy.put_back import begin_storage, check_unused, put_back
from deploy.report.write import write_report
from deploy.run_dir import RunDir, create_run_dir
from deploy.run_storage import run_storage
from deploy.seen import check_seen
from deploy.ui.index import Filter, open_index
from distrl.config import load_config, make_config
from distrl.errors import RefusedError, RunError
from distrl.ledger import Ledger
from distrl.ledger_reader import LedgerReader
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.storage import Folder
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from learners.checkpoint import CheckpointWriter, TrainState
from learners.world import World
from tests.builders import refusal
from tests.learners.test_checkpoint import save_tokenizer, trained
from tests.storage.server import needs_server
from tests.system import sigkill

DEADLINE_S = 300.0


def _wait_for_checkpoint(run: Path, step: int, log: Path, driver: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and driver.poll() is None:
        with contextlib.suppress(Exception), LedgerReader(run / "ledger.sqlite") as ledger:
            last = ledger.last_checkpoint()
            if last is not None and last.step >= step and f"{Path(last.path).name}.sqlite" in _copies(run):
                return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of step {step}:\n{log.read_text()}")


def _copies(run: Path) -> dict[str, int]:
    return run_storage(RunDir(run)).ledgers.files()


@needs_server
@pytest.mark.ray
@pytest.mark.nodes
def test_a_run_that_loses_its_directory_goes_on_from_the_storage_to_the_same_weights(
    address: str, tmp_path: Path
) -> None:
    make_tiny_model(
        tmp_path / "model",
        character_tokenizer(ALPHABET),
        seed=0,
        architecture=TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64),
    )
    log, run = tmp_path / "log", tmp_path / "killed"
    alone, killed = sigkill._config(tmp_path, "alone", {}), sigkill._config(tmp_path, "killed", {})
    values = yaml.safe_load(killed.read_text())
    killed.write_text(yaml.safe_dump({**values, "storage": {"uri": f"{address}"}}))

    assert sigkill._start("train", alone).wait(DEADLINE_S) == 0, log.read_text()
    driver = sigkill._start("train", killed)
    _wait_for_checkpoint(run, 4, log, driver)
    sigkill._end(driver)
    shutil.rmtree(run)

    config = load_config(killed)
    assert resume_or_start(config)["state"] == "finished"
    found = audit_run(run)
    assert found.violations == ()
    assert (found.steps, found.committed_steps) == (sigkill.STEPS, sigkill.STEPS)
    (copy,) = found.put_back
    assert copy["checkpoint"].startswith("s3://bucket/runs/killed/checkpoints/step-")
    assert not (run / "journal").exists()
    assert not (run / "checkpoints").exists()

    storage = run_storage(RunDir(run))
    names = storage.checkpoints.folders()
    with LedgerReader(run / "ledger.sqlite") as ledger:
        assert names == sorted(Path(c.path).name for c in ledger.checkpoints())  # retention, and nothing unnamed
    assert set(storage.ledgers.files()) == {f"{name}.sqlite" for name in names}
    with local_checkpoint(storage, str(last_checkpoint(RunDir(run)))) as checkpoint:
        assert sigkill.contents(checkpoint) == sigkill.contents(sigkill._last(tmp_path / "alone"))

    # Every command over it.
    index = open_index(RunDir(run))
    committed = found.tickets["committed"] * 4
    assert index.refresh() >= committed
    made = export(run, out=tmp_path / "exported")
    assert made["step"] == sigkill.STEPS
    before = found.journal_files
    assert write_report(run).page.is_file()
    assert "is left out" not in write_report(run).page.read_text()
    compacted = compact_run(run, drop_committed=False)
    assert compacted.files_after == 1 < before
    assert list(storage.journal.files()) == [f"compact-{_epoch(run):06d}-000000.arrow"]
    assert index.refresh() == index.find(Filter())[1] == committed
    row = index.find(Filter(), limit=1)[0][0]
    one = index.one(row["rollout_id"])
    assert one is not None
    assert Path(one["file"]).name.startswith("compact-")
    assert audit_run(run).violations == ()
    # The copy of the ledger knows the new journal file.
    put_back_again = tmp_path / "again" / "killed"
    put_back(put_back_again, address)
    assert audit_run(put_back_again).violations == ()

    assert compact_run(run, drop_committed=True).retired == found.tickets["committed"]
    assert index.refresh() == 0
    index.close()


def _epoch(run: Path) -> int:
    with LedgerReader(run / "ledger.sqlite") as ledger:
        return ledger.epoch()


@pytest.fixture(params=["disk", pytest.param("s3", marks=needs_server)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "kept")
    address: str = request.getfixturevalue("address")
    return address.replace("/runs?", f"/{request.node.name.split('[')[0]}?")


def _values(tmp_path: Path, uri: str) -> dict[str, Any]:
    return {
        "run": {"dir": str(tmp_path / "runs"), "name": "mine"},
        "storage": {"uri": uri},
        "model": {"path": str(tmp_path)},
        "data": {"source": "sort_digits"},
    }


def test_a_name_that_the_storage_has_is_not_used_again(uri: str, tmp_path: Path) -> None:
    config = make_config(_values(tmp_path, uri))
    check_unused(config)
    run_dir = create_run_dir(config)
    begin_storage(config, run_dir)
    shutil.rmtree(run_dir.path)
    folder = Folder(uri)
    assert refusal(RefusedError, lambda: check_unused(config)) == (
        f"run.name: {folder / 'mine'} must not hold a run yet, a run never overwrites another; choose a new name with "
        f"run.name=..., or put its directory back: distrl resume {config.run_dir} --storage {uri}"
    )
    assert refusal(RunError, lambda: put_back(config.run_dir, uri)) == (
        f"storage.uri: {folder / 'mine' / 'ledgers'} must hold a copy of the ledger whose checkpoint is whole: there "
        "is none: the run had no checkpoint yet, start it anew under another name"
    )
    assert not config.run_dir.exists()
    assert refusal(RefusedError, lambda: put_back(tmp_path / "other", uri)) == (
        f"--storage: {uri} must hold the run other, {folder / 'other'} has no config.yaml"
    )
    config.run_dir.mkdir(parents=True)
    assert refusal(RefusedError, lambda: put_back(config.run_dir, uri)) == (
        f"--storage: {config.run_dir} must not exist, a run is put back only where its directory is lost; leave "
        "--storage out"
    )


@needs_server
def test_an_upload_that_breaks_off_leaves_no_named_checkpoint_and_its_files_go(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(_values(tmp_path, address.replace("/runs?", "/upload?")))
    run_dir = create_run_dir(config)
    storage = run_storage(run_dir)
    writer = CheckpointWriter(World(), save_tokenizer, storage.checkpoints)
    model, optimizer = trained(seed=0, steps=1)
    sent: list[str] = []
    write_file = Folder.write_file

    def break_off(folder: Folder, name: str, source: Path) -> None:
        if len(sent) == 2:
            raise OSError("the cable is cut")
        sent.append(name)
        write_file(folder, name, source)

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "write_file", break_off)
        writer.begin(tmp_path / "sending" / "step-000001-v1", model, model, optimizer, TrainState(1, 1))
        with pytest.raises(RunError) as error:
            writer.finished(wait=True)
    assert str(error.value) == (
        f"checkpoint {storage.checkpoints}/step-000001-v1: cannot be written: the cable is cut; make room here, and "
        "see that storage.uri can be reached and written to, then go on with distrl resume"
    )
    assert len(storage.checkpoints.files(recursive=True)) == 2
    assert list((tmp_path / "sending").iterdir()) == []

    # The next one is whole, and has the hash of the files that were sent.
    writer.begin(tmp_path / "sending" / "step-000002-v2", model, model, optimizer, TrainState(2, 2))
    written = writer.finished(wait=True)
    assert written is not None
    assert written.location == f"{storage.checkpoints}/step-000002-v2"
    assert written.sha256 == storage.checkpoint(written.location).sha256()

    ledger = Ledger(run_dir.ledger)
    ledger.allocate_version(None, 0)
    ledger.commit_checkpoint(written.location, step=2, version=0, sha256=written.sha256)
    ledger.close()
    assert last_checkpoint(run_dir) == written.location
    assert remove_unnamed(run_dir) == ["step-000001-v1"]
    assert storage.checkpoints.folders() == ["step-000002-v2"]


def test_storage_that_cannot_be_reached_ends_a_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(_values(tmp_path, str(tmp_path / "kept")))

    def fail(folder: Folder, **_: Any) -> dict[str, int]:
        raise OSError("AWS Error NETWORK_CONNECTION during ListObjectsV2 operation: curlCode: 7")

    monkeypatch.setattr(Folder, "files", fail)
    assert refusal(RunError, lambda: check_unused(config)) == (
        f"storage.uri: {tmp_path}/kept/mine must be reachable: AWS Error NETWORK_CONNECTION during ListObjectsV2 "
        "operation: curlCode: 7; mend it and call again"
    )


def test_a_folder_that_a_machine_does_not_see_is_refused(tmp_path: Path) -> None:
    nodes = [{"NodeManagerAddress": "10.0.0.1"}, {"NodeManagerAddress": "10.0.0.2"}]
    check_seen(tmp_path, "storage.uri", nodes, lambda node, mark: mark.is_file())
    told = refusal(
        RefusedError,
        lambda: check_seen(tmp_path, "storage.uri", nodes, lambda node, mark: node["NodeManagerAddress"] == "10.0.0.1"),
    )
    assert told == (
        f"storage.uri must be seen by every machine of the cluster, 10.0.0.2 does not see {tmp_path}; set storage.uri "
        "to object storage, such as s3://bucket/runs, or to a volume that all of them share"
    )
    assert list(tmp_path.iterdir()) == []
    check_seen(tmp_path, "storage.uri", nodes, lambda node, mark: None)  # one that is gone is in nobody's way


def test_the_newest_copy_is_taken_by_step_and_version() -> None:
    names = ["step-000004-v5.sqlite", "step-000010-v11.sqlite", "step-000010-v9.sqlite", "other.sqlite"]
    assert sorted(names, key=module._step_and_version, reverse=True)[:2] == [names[1], names[2]]
