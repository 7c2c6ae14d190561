"""`distrl resume RUN --storage URI` with real processes: the run's directory is lost and put back by the command."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from deploy.audit import audit_run
from deploy.run_dir import RunDir
from deploy.run_state import RunState, read_state
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.storage.test_run_in_storage import _wait_for_checkpoint
from tests.system import sigkill

pytestmark = [pytest.mark.ray, pytest.mark.nodes]


def test_a_run_whose_directory_is_lost_is_resumed_from_a_folder_and_finishes(tmp_path: Path) -> None:
    size = TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64)
    make_tiny_model(tmp_path / "model", character_tokenizer(ALPHABET), seed=0, architecture=size)
    config, kept = sigkill._config(tmp_path, "lost", {}), tmp_path / "kept"
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**values, "storage": {"uri": str(kept)}}))
    run, log = tmp_path / "lost", tmp_path / "log"

    driver = sigkill._start("train", config)
    _wait_for_checkpoint(run, 4, log, driver)
    sigkill._end(driver)
    shutil.rmtree(run)

    # Without --storage there is nothing to go on with, and the message says what is missing.
    assert sigkill._start("resume", run).wait(sigkill.DEADLINE_S) == 2
    assert f"RUN: {run} must be a run directory, it does not exist" in log.read_text()
    assert not run.exists()

    assert sigkill._start("resume", run, "--storage", str(kept)).wait(sigkill.DEADLINE_S) == 0, log.read_text()
    assert read_state(RunDir(run)) == RunState.FINISHED
    assert json.loads((run / "summary.json").read_text())["steps"] == sigkill.STEPS
    found = audit_run(run)
    assert found.violations == ()
    assert (found.steps, found.committed_steps) == (sigkill.STEPS, sigkill.STEPS)
    (copy,) = found.put_back
    assert Path(copy["checkpoint"]).parent == kept / "lost" / "checkpoints"
    # Asked for again it is refused: the directory is there, and the run has ended.
    assert sigkill._start("resume", run, "--storage", str(kept)).wait(sigkill.DEADLINE_S) == 2
    assert f"--storage: {run} must not exist" in log.read_text()
