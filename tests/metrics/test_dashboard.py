"""Dashboard and alert rules speak of metrics that exist."""

import json
import re
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from actors.recorder import Recorder
from deploy.metrics import dashboard
from deploy.metrics.exporter import Exporter
from tests.metrics.snapshots import record, snapshot

ALERTS = dashboard.FILE.parents[1] / "prometheus" / "alerts.yaml"


def metrics_in(queries: list[str]) -> set[str]:
    return {name for query in queries for name in re.findall(r"distrl_\w+", query)}


def panel_queries() -> list[str]:
    panels: list[dict[str, Any]] = json.loads(dashboard.FILE.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def occasional() -> set[str]:
    return metrics_in([query for _, _, targets in dashboard.OCCASIONAL for query, _ in targets])


def test_the_file_of_the_dashboard_is_what_its_table_gives() -> None:
    assert dashboard.FILE.read_text() == dashboard.render(), "run: python -m deploy.metrics.dashboard"


@pytest.mark.parametrize("source", ["dashboard", "alerts"])
def test_every_metric_that_is_asked_for_is_exported(source: str) -> None:
    registry, recorder = CollectorRegistry(), Recorder(None, lambda: 1.0)
    record(recorder, 1)
    recorder.event("checkpoint", "step 1")
    recorder.failed_call("grading", "it broke")
    recorder.evaluation({"name": "before", "accuracy": 0.5})
    Exporter(registry, steps=3).update(snapshot(1, records=recorder.after(-1)))
    exported = {sample.name for family in registry.collect() for sample in family.samples}
    if source == "dashboard":
        asked = metrics_in(panel_queries())
    else:
        rules = [r for g in yaml.safe_load(ALERTS.read_text())["groups"] for r in g["rules"]]
        asked = metrics_in([r["expr"] for r in rules])
    assert asked - exported == set()
    assert len(asked) > 5
