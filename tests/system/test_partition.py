"""The network between two Ray nodes of a run is cut; `make chaos` has the long form."""

import tempfile
from pathlib import Path

import pytest

from tests.system.partition import cut_for_a_while, cut_for_good, missing, partitioned

pytestmark = [pytest.mark.ray, pytest.mark.nodes]

if cause := missing():
    pytest.skip(cause, allow_module_level=True)


def test_a_cable_that_is_cut_for_a_while_and_then_for_good_costs_no_ticket() -> None:
    # Not tmp_path: Ray's sockets have their names there, which may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="dp") as folder, partitioned(Path(folder), stage="grading") as there:
        nodes, run = there
        cut_for_a_while(nodes, run, 2.0, "grading")
        assert run.records("restarted") == []
        cut_for_good(nodes, run, "grading")
        assert run.records("restarted") != []
        run.stop()
