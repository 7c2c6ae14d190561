"""A synchronous run that is killed ends with the files of one that was not; `make sigkill` has the long form."""

from pathlib import Path

import pytest

from tests.system.sigkill import compare


@pytest.mark.ray
def test_a_run_that_is_killed_and_resumed_ends_with_the_weights_and_optimizer_of_one_that_was_not(
    tmp_path: Path,
) -> None:
    found = compare(tmp_path, kills=1, seed=1)
    alone, killed = found.files
    assert "model.safetensors" in alone
    assert any(name.startswith("training/") for name in alone)  # the optimizer's state
    assert alone == killed
    assert found.violations == ()
    assert len(found.killed_after) == 1
