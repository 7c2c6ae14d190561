"""The nodes that a RayJob's manifest describes, as raylets on the loopback address of one machine."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from deploy.k8s.objects import Json

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
        self.log = Path(self._folder.name) / "nodes.log"
        # Not 127.0.0.1, which Ray takes for another name of the machine.
        self.address = f"{HEAD}:{_free_port(HEAD)}"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_ADDRESS": self.address,
            "RAY_enable_worker_prestart": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        cluster = job["spec"]["rayClusterSpec"]
        head, port = cluster["headGroupSpec"], self.address.rpartition(":")[2]
        self._nodes = [
            self._start(
                HEAD, "--head", f"--port={port}", "--include-dashboard=false", amounts=head["resources"], first=True
            )
        ]
        by_name = {g["groupName"]: g for g in cluster["workerGroupSpecs"]}
        self._waiting = [by_name[name]["resources"] for name in groups]

    def __enter__(self) -> Self:
        for i, amounts in enumerate(self._waiting):
            self._nodes.append(self._start(f"127.0.1.{i + 2}", f"--address={self.address}", amounts=amounts))
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
            AssertionError: a node has ended; has what the nodes wrote.
        """
        assert all(node.poll() is None for node in self._nodes), self.log.read_text()

    def _start(
        self, host: str, *arguments: str, amounts: Mapping[str, Any], first: bool = False
    ) -> "subprocess.Popen[bytes]":
        own = {name: float(amount) for name, amount in amounts.items() if name not in ("CPU", "GPU")}
        command = [
            *("ray", "start", *arguments, "--block", "--disable-usage-stats", f"--node-ip-address={host}"),
            *(f"--num-cpus={amounts['CPU']}", f"--num-gpus={amounts.get('GPU', 0)}", f"--resources={json.dumps(own)}"),
            *("--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"),
            *(f"--dashboard-agent-listen-port={_free_port(host)}", f"--metrics-export-port={_free_port(host)}"),
        ]
        # Nodes of one machine that start at the same moment would choose the same names.
        sockets = Path(self._folder.name) / host
        command += [f"--plasma-store-socket-name={sockets}.plasma", f"--raylet-socket-name={sockets}.raylet"]
        if first:
            command.append(f"--temp-dir={self._folder.name}")
        with self.log.open("ab") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, process_group=0)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
