"""A real Prometheus scrapes a real run, and finds every metric that the dashboard asks for."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from deploy.metrics import dashboard
from deploy.progress import Silent
from deploy.run import run_training
from deploy.start import start_ray
from distrl.config import make_config
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.metrics.test_dashboard import ALERTS, metrics_in, occasional, panel_queries

DEADLINE_S = 60.0


def needs(command: str, package: str) -> Any:
    return pytest.mark.skipif(
        shutil.which(command) is None, reason=f"{command} is not installed: apt-get install {package}"
    )


@needs("promtool", "prometheus")
def test_prometheus_accepts_the_alert_rules() -> None:
    ended = subprocess.run(["promtool", "check", "rules", str(ALERTS)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "10 rules found" in ended.stdout


class Prometheus:
    """A server that follows the runs of a folder."""

    def __init__(self, folder: Path, runs: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{probe.getsockname()[1]}"
        settings = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [
                {
                    "job_name": "distrl",
                    "file_sd_configs": [{"files": [f"{runs}/.prometheus/*.json"], "refresh_interval": "500ms"}],
                }
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address={self._address}",
            ],
            stdout=self._log,
            stderr=self._log,
        )

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._log.close()

    def ask(self, query: str) -> list[dict[str, Any]]:
        url = f"http://{self._address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found

    def wait_for(self, query: str) -> list[dict[str, Any]]:
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, "Prometheus has ended"
            try:
                if found := self.ask(query):
                    return found
            except OSError:
                pass  # not up yet
            time.sleep(0.1)
        raise AssertionError(f"Prometheus has nothing for {query} after {DEADLINE_S:g} s")


class Pause(Silent):
    """Holds the driver before it goes on at a step, until Prometheus has seen what was exported up to there."""

    def __init__(self, prometheus: Prometheus) -> None:
        self._prometheus = prometheus
        self.series: set[str] = set()
        self.text = b""
        self.labels: dict[str, str] = {}

    def update(self, snapshot: dict[str, Any]) -> None:
        if snapshot["step"] < 5 or self.series:
            return
        (step,) = self._prometheus.wait_for("distrl_step >= 3")
        self._prometheus.wait_for("distrl_checkpoints_total > 0")
        self.labels = step["metric"]
        self.series = {row["metric"]["__name__"] for row in self._prometheus.ask('{__name__=~"distrl_.+"}')}
        with urllib.request.urlopen(f"http://{step['metric']['instance']}/metrics") as answer:
            self.text = answer.read()


@pytest.fixture(scope="module", name="seen")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Pause:
    folder = tmp_path_factory.mktemp("prometheus")
    runs, model = folder / "runs", folder / "model"
    size = TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64)
    make_tiny_model(model, character_tokenizer(ALPHABET), seed=0, architecture=size)
    values = {
        "run": {"dir": runs, "name": "watched"},
        "model": {"path": model},
        "data": {"source": "sort_digits", "heldout_size": 8, "options": {"digits": 4}},
        "rollout": {"group_size": 4, "max_new_tokens": 6},
        "generation": {"slots": 16},
        "objective": {"options": {"kl_coefficient": 0.01}},
        "train": {"steps": 8, "tickets_per_step": 4, "checkpoint_every_steps": 2},
        "evaluation": {"problems": 8, "every_steps": 0},
    }
    prometheus = Prometheus(folder, runs)
    pause = Pause(prometheus)
    start_ray()
    try:
        run_training(make_config(values), pause)
    finally:
        ray.shutdown()
        prometheus.close()
    return pause


@needs("prometheus", "prometheus")
@pytest.mark.ray
def test_every_metric_of_the_dashboard_is_in_the_run(seen: Pause) -> None:
    assert metrics_in(panel_queries()) - occasional() - seen.series == set()
    assert seen.labels["run"] == "watched"


@needs("promtool", "prometheus")
@pytest.mark.ray
def test_the_names_of_the_metrics_keep_prometheus_rules(seen: Pause) -> None:
    ended = subprocess.run(["promtool", "check", "metrics"], input=seen.text, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stdout.decode() + ended.stderr.decode()


def test_the_panels_of_failures_are_those_that_may_have_no_series_yet() -> None:
    assert occasional() == {"distrl_dropped_tickets_total", "distrl_failed_calls_total"}
    assert occasional() < metrics_in(panel_queries())
    assert dashboard.FILE.exists()
