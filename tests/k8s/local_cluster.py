"""The nodes that a RayJob's manifest describes, as raylets on the loopback address of one machine."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from deploy.k8s.objects import Json

START_S = 120.0
END_S = 20.0
HEAD = "127.0.1.1"


class LocalCluster:
    """`ray start` for the head and a pod of each group, with the resources and the authentication of the manifest.

    Args:
        job: a RayJob as `run_objects` makes it.
        groups: of the worker groups those that are wanted.
    """

    def __init__(self, job: Json, groups: Sequence[str]) -> None:
        # Sockets below it have names of at most 107 bytes, which pytest's folders use up.
        self._folder = tempfile.TemporaryDirectory(prefix="ray-")
        self._nodes: list[subprocess.Popen[bytes]] = []
        # Not 127.0.0.1, which Ray takes for another name of the machine.
        self.address = f"{HEAD}:{_free_port(HEAD)}"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_ADDRESS": self.address,
            "RAY_enable_worker_prestart": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        cluster = job["spec"]["rayClusterSpec"]
        self._head = cluster["headGroupSpec"]["resources"]
        by_name = {g["groupName"]: g for g in cluster["workerGroupSpecs"]}
        self._groups = [by_name[name]["resources"] for name in groups]

    def __enter__(self) -> Self:
        try:
            port = self.address.rpartition(":")[2]
            self._start(HEAD, "--head", f"--port={port}", "--include-dashboard=false", amounts=self._head, first=True)
            for i, amounts in enumerate(self._groups):
                self._start(f"127.0.1.{i + 2}", f"--address={self.address}", amounts=amounts)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for node in reversed(self._nodes):
            node.terminate()
        for node in self._nodes:
            try:
                node.wait(END_S)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
        self._folder.cleanup()

    def check(self) -> None:
        """
        Raises:
            AssertionError: a node has ended.
        """
        assert [node.poll() for node in self._nodes] == [None] * len(self._nodes)

    def _start(self, host: str, *arguments: str, amounts: Mapping[str, Any], first: bool = False) -> None:
        own = {name: float(amount) for name, amount in amounts.items() if name not in ("CPU", "GPU")}
        command = [
            *("ray", "start", *arguments, "--block", "--disable-usage-stats", f"--node-ip-address={host}"),
            *(f"--num-cpus={amounts['CPU']}", f"--num-gpus={amounts.get('GPU', 0)}", f"--resources={json.dumps(own)}"),
            *("--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"),
            *(f"--dashboard-agent-listen-port={_free_port(host)}", f"--metrics-export-port={_free_port(host)}"),
        ]
        if first:
            command.append(f"--temp-dir={self._folder.name}")
        log = Path(self._folder.name) / f"{host}.log"
        with log.open("wb") as written:
            node = subprocess.Popen(command, env=self.environment, stdout=written, stderr=written, process_group=0)
        self._nodes.append(node)
        # One after the other: nodes of one machine that start at the same moment choose the same names of sockets.
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
