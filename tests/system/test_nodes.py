"""A second Ray node joins a run and leaves it announced, two raylets on this machine; `make chaos` also kills them."""

from pathlib import Path

import pytest

from tests.system.nodes import announced_node, driven, judge, one_node_cluster

pytestmark = [pytest.mark.ray, pytest.mark.nodes]


def test_a_node_joins_and_hands_its_work_back_before_it_goes(tmp_path: Path) -> None:
    with one_node_cluster() as cluster, driven(tmp_path, cluster) as run:
        announced_node(cluster, run)
        judge(run)
