"""The entrypoint of the RayJob, as it stands, on the nodes of its manifest: killed, and called again."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.audit import audit_run
from deploy.checkpoints import last_checkpoint
from deploy.k8s.objects import Json, run_objects
from deploy.k8s.values import make_values
from deploy.process_table import read_processes
from deploy.run_dir import RunDir
from distrl.config import make_config
from distrl.errors import LedgerError
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.k8s.local_cluster import LocalCluster
from tests.k8s.test_render import job

DEADLINE_S = 240.0
STEPS = 24
GROUPS = ("learner", "generation", "grading")


@pytest.fixture(name="config")
def a_run(tmp_path: Path) -> dict[str, Any]:
    model = tmp_path / "model"
    size = TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64)
    make_tiny_model(model, character_tokenizer(ALPHABET), seed=0, architecture=size)
    return {
        "run": {"dir": str(tmp_path / "runs"), "name": "job"},
        "model": {"path": str(model)},
        "data": {"source": "sort_digits", "heldout_size": 8, "options": {"digits": 4}},
        "rollout": {"group_size": 4, "max_new_tokens": 6},
        "generation": {"slots": 16},
        "train": {"steps": STEPS, "tickets_per_step": 4, "checkpoint_every_steps": 2},
        "evaluation": {"problems": 8, "every_steps": 0},
    }


@pytest.fixture(name="objects")
def rendered_objects(config: dict[str, Any]) -> list[Json]:
    made = make_config(config)
    return run_objects(made, make_values("cpu", ["image=distrl:1"], made))


@pytest.fixture(name="manifest")
def rendered_job(objects: list[Json]) -> Json:
    return job(objects)


@pytest.fixture(name="file")
def config_of_the_pods(objects: list[Json], config: dict[str, Any], tmp_path: Path) -> Path:
    """What the head's pod mounts; only its places are those of this machine."""
    (mounted,) = [o["data"]["config.yaml"] for o in objects if o["kind"] == "ConfigMap"]
    file = tmp_path / "config.yaml"
    own = {"run": config["run"], "metrics": {}, "storage": {"uri": str(tmp_path / "shared")}}
    file.write_text(yaml.safe_dump({**yaml.safe_load(mounted), **own}))
    return file


@pytest.fixture(name="cluster")
def nodes_of_the_manifest(manifest: Json) -> Iterator[LocalCluster]:
    with LocalCluster(manifest, GROUPS) as cluster:
        yield cluster


class Driver:
    """What KubeRay's submitter has the head run: the entrypoint, in a shell."""

    def __init__(self, cluster: LocalCluster, entrypoint: str, config: Path, log: Path) -> None:
        self._log = log
        self._cluster = cluster
        environment = {**cluster.environment, "DISTRL_CONFIG": str(config)}
        with log.open("ab") as written:
            # A process group of its own: the shell and the driver die together, as those of a pod do.
            self._process = subprocess.Popen(
                entrypoint, shell=True, env=environment, stdout=written, stderr=written, process_group=0
            )

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not what():
            assert self._process.poll() is None, self._log.read_text()
            self._cluster.check()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def ended_well(self) -> None:
        try:
            assert self._process.wait(DEADLINE_S) == 0, self._log.read_text()
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(self._log.read_text()) from None


def committed(run: Path) -> bool:
    """Whether the run's ledger names a checkpoint to go on from."""
    try:
        return last_checkpoint(RunDir(run)) is not None
    except LedgerError:
        return False  # it is just being made


@pytest.mark.ray
@pytest.mark.nodes
def test_the_entrypoint_is_killed_and_called_again_and_finishes_the_run(
    file: Path, manifest: Json, cluster: LocalCluster, tmp_path: Path
) -> None:
    log, run = tmp_path / "log", tmp_path / "runs" / "job"

    def attempt() -> Driver:
        return Driver(cluster, manifest["spec"]["entrypoint"], file, log)

    first = attempt()
    first.wait_for(lambda: committed(run))
    nodes = {row["stage"]: row["node"] for row in read_processes(RunDir(run)) if "node" in row}
    assert nodes["coordinator"] == nodes["journal"] == nodes["policy-store"]
    # Every group has its own, and none is the head's.
    assert len({nodes[stage] for stage in ("coordinator", *GROUPS)}) == 1 + len(GROUPS)
    first.kill()
    assert not (run / "summary.json").exists()

    attempt().ended_well()
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["state"], summary["steps"]) == ("finished", STEPS)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(r["kind"] == "resumed" for r in records)
    assert not list(tmp_path.glob("runs/job.abandoned-*"))
    assert not audit_run(run).violations

    # A finished job that is called again has nothing to do, and succeeds.
    attempt().ended_well()
    assert json.loads((run / "summary.json").read_text()) == summary
