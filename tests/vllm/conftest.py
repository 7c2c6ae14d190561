"""Fixtures of the tests that need vLLM; without it they are skipped."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.vllm.shared import SharedVllm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # vLLM's own code, wherever in torch it is noticed.
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[SharedVllm]":
    from tests.vllm.shared import SharedVllm

    running = SharedVllm(tmp_path_factory.mktemp("vllm"))
    yield running
    running.close()
