"""Settings for the tests of the report."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.runs import MadeRun, copy_run, make_run


@pytest.fixture(autouse=True, scope="session")
def _journal_writes_at_once() -> Iterator[None]:
    """The files are the same; a run of twelve tickets is written in a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.journal.FLUSH_S", 0.0)
        yield


@pytest.fixture(scope="session")
def usual_run(_journal_writes_at_once: None, tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """A run of four steps that has not finished; only to be read."""
    return make_run(tmp_path_factory.mktemp("usual"))


@pytest.fixture
def made(usual_run: MadeRun, tmp_path: Path) -> MadeRun:
    """A copy of it that a test may change."""
    return copy_run(usual_run, tmp_path)
