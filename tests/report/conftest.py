"""Settings for the tests of the report."""

from pathlib import Path

import pytest

from tests.report.runs import MadeRun, copy_run, make_run

JOURNAL_WAITS = "actors.journal.FLUSH_S"
"""Set to 0 here: the files are the same, and a run of twelve tickets is written in a tenth of the time. Never longer
than a test or fixture of this folder: the simulation counts on the seconds that a journal waits."""


@pytest.fixture(autouse=True)
def _journal_writes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JOURNAL_WAITS, 0.0)


@pytest.fixture(scope="session")
def usual_run(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """A run of four steps that has not finished; only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JOURNAL_WAITS, 0.0)
        return make_run(tmp_path_factory.mktemp("usual"))


@pytest.fixture
def made(usual_run: MadeRun, tmp_path: Path) -> MadeRun:
    """A copy of it that a test may change."""
    return copy_run(usual_run, tmp_path)
