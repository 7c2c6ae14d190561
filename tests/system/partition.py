"""Cuts the network between two Ray nodes of a real run: each in a network namespace, a cable between them.

python -m tests.system.partition      # cut for a while; cut until the node is given up; both again with a learner there

Needs root and iproute2.
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deploy.audit import audit_run
from deploy.ray_train import RESOURCE
from deploy.scaling import scale_run
from distrl.audit import Audit
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "cable0"
"""The end of the cable, in both namespaces."""
WAIT_S = 180.0
TICKETS_PER_STEP = 4
GIVEN_UP = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
"""Ray gives a node up after five of these in a row instead of after about a minute."""


def missing() -> str | None:
    """Why namespaces cannot be made here; None where they can."""
    if shutil.which("ip") is None:
        return "the command ip (package iproute2) is not there"
    name = f"distrl-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces cannot be made here: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return None


class TwoNodes:
    """Two Ray nodes that see each other over a cable only; the first one is the head."""

    def __init__(self, folder: Path, learners: tuple[int, int]) -> None:
        self.names = tuple(f"distrl-{os.getpid()}-{i}" for i in range(2))
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", CABLE, "netns", self.names[0], "type", "veth", "peer", CABLE, "netns", self.names[1])
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", CABLE)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", CABLE, "up")
        # Of these two nodes alone, whatever other clusters on this machine have.
        self._token = secrets.token_hex(32)
        self._log_file = folder / "log"
        self._log = self._log_file.open("ab")
        self._started: list[subprocess.Popen[bytes]] = []
        head = ("--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={folder}/ray")
        self._start_node(0, *head, learners=learners[0])
        wait_until(lambda: self._listens(), "the head node is there")
        self._start_node(1, f"--address={ADDRESSES[0]}:6379", learners=learners[1])

    def _start_node(self, place: int, *arguments: str, learners: int) -> None:
        resources = json.dumps({RESOURCE: learners} if learners else {})
        common = ("--num-cpus=2", "--object-store-memory=100000000", f"--resources={resources}", "--block")
        code = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"
        address = f"--node-ip-address={ADDRESSES[place]}"
        self.start(place, sys.executable, "-c", code, "start", address, *common, *arguments)

    def start(self, place: int, *command: str, **environment: str) -> "subprocess.Popen[bytes]":
        """Starts a process on one of the nodes."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[place], *command],
            stdout=self._log,
            stderr=self._log,
            env={
                **os.environ,
                **GIVEN_UP,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "GLOO_SOCKET_IFNAME": CABLE,
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": self._token,
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_worker_maximum_startup_concurrency": "16",
                **environment,
            },
        )
        self._started.append(process)
        return process

    def said(self) -> str:
        """The end of what the processes have written."""
        return self._log_file.read_text(errors="replace")[-4000:]

    def _listens(self) -> bool:
        found = subprocess.run(
            ["ip", "netns", "exec", self.names[0], "cat", "/proc/net/tcp", "/proc/net/tcp6"],
            capture_output=True,
            text=True,
            check=False,
        )
        return f":{6379:04X} " in found.stdout

    def cut(self) -> None:
        _ip("-n", self.names[1], "link", "set", CABLE, "down")

    def mend(self) -> None:
        _ip("-n", self.names[1], "link", "set", CABLE, "up")

    def end(self) -> None:
        """Kills everything that runs in the two namespaces, and removes them."""
        for name in self.names:
            deadline = time.monotonic() + 30
            while (pids := _ip("netns", "pids", name).split()) and time.monotonic() < deadline:
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                time.sleep(0.1)
            _ip("netns", "del", name)
        for process in self._started:
            process.wait()
        self._log.close()


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {WAIT_S:g} s"
        time.sleep(0.1)


class PartitionedRun:
    """A run whose processes are on two nodes."""

    def __init__(self, folder: Path, nodes: TwoNodes, max_workers: int | None) -> None:
        self._nodes = nodes
        self.path = folder / "run"
        size = TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64)
        make_tiny_model(folder / "model", character_tokenizer(ALPHABET), seed=0, architecture=size)
        config = folder / "config.yaml"
        config.write_text(json.dumps(_config(folder, max_workers)))
        code = "from deploy.cli import main; main()"
        command = (sys.executable, "-c", code, "train", str(config))
        self.driver = nodes.start(0, *command, RAY_ADDRESS=f"{ADDRESSES[0]}:6379")

    def records(self, kind: str) -> list[dict[str, Any]]:
        metrics = self.path / "metrics.jsonl"
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def places(self, stage: str) -> list[str]:
        """Ray's ids of the nodes on which processes of a stage are up."""
        table = self.path / "processes.json"
        rows = json.loads(table.read_text())["processes"] if table.exists() else []
        return [r["node"] for r in rows if r["stage"] == stage and r["state"] == "up" and "node" in r]

    def trains_on(self, steps: int = 3) -> None:
        done = len(self.records("step"))

        def is_further() -> bool:
            assert self.driver.poll() is None, "the run ended"
            return len(self.records("step")) >= done + steps

        wait_until(is_further, f"{steps} more steps")

    def stop(self) -> Audit:
        """Asks the run to stop and judges it."""
        (self.path / "stop").touch()
        assert self.driver.wait(WAIT_S) == 0
        found = audit_run(self.path)
        assert found.violations == (), found.violations
        assert found.tickets["committed"] == TICKETS_PER_STEP * found.committed_steps, found.tickets
        assert found.drops == {}, found.drops
        return found


def _config(folder: Path, max_workers: int | None) -> Mapping[str, Any]:
    return {
        "run": {"dir": str(folder), "name": "run"},
        "model": {"path": str(folder / "model")},
        "data": {"source": "sort_digits", "heldout_size": 16, "options": {"digits": 4}},
        "rollout": {"group_size": 4, "max_new_tokens": 6},
        "generation": {"actors": 2, "slots": 16, "timeout_s": 60},
        "grading": {"actors": 2},
        "train": {
            "steps": 100_000,
            "tickets_per_step": TICKETS_PER_STEP,
            "checkpoint_every_steps": 2,
            "max_workers": max_workers,
        },
        "evaluation": {"problems": 16, "every_steps": 0},
        "limits": {"restarts": 100, "call_attempts": 6},
    }


@contextmanager
def partitioned(
    folder: Path, *, stage: str = "generation", learners: tuple[int, int] = (1, 0)
) -> Iterator[tuple[TwoNodes, PartitionedRun]]:
    """A run that is under way with processes of a stage on both of two nodes."""
    nodes = TwoNodes(folder, learners)
    try:
        run = PartitionedRun(folder, nodes, 2 if sum(learners) > 1 else None)
        run.trains_on()
        while len(set(run.places(stage))) < 2:  # Ray says where
            scale_run(run.path, {stage: len(run.places(stage)) + 2}, WAIT_S)
        run.trains_on()
        yield nodes, run
    except BaseException:
        print(nodes.said())
        raise
    finally:
        nodes.end()


def cut_for_a_while(nodes: TwoNodes, run: PartitionedRun, seconds: float, stage: str = "generation") -> None:
    """The cable is mended before Ray gives the node up: the same processes go on."""
    before = sorted(run.places(stage))
    nodes.cut()
    time.sleep(seconds)
    nodes.mend()
    run.trains_on()
    wait_until(lambda: sorted(run.places(stage)) == before, f"{stage} on both nodes again")


def cut_for_good(nodes: TwoNodes, run: PartitionedRun, stage: str = "generation") -> None:
    """The cable stays cut until Ray has given the node up, and others have started on the node that is left."""
    (head,) = set(run.places("coordinator"))
    before = len(run.places(stage))
    nodes.cut()
    wait_until(lambda: run.places(stage) == [head] * before, f"{stage} on the node that is left, as many as before")
    run.trains_on()


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if cause := missing():
        print(f"skipped: {cause}")
        return 0
    for learners in ((1, 0), (1, 1)):
        with tempfile.TemporaryDirectory(prefix="dp") as folder, partitioned(Path(folder), learners=learners) as there:
            nodes, run = there
            for seconds in (1.0, 3.0):
                cut_for_a_while(nodes, run, seconds)
            cut_for_good(nodes, run)
            nodes.mend()
            run.trains_on()
            found = run.stop()
            print(json.dumps({"learners": learners, "tickets": found.tickets, "returned": dict(found.returned)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
