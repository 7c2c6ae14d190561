"""Serves the metrics of a run to Prometheus."""

import json
import socket
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from distrl.config_sections import MetricsConfig
from distrl.errors import RefusedError, RunError


def check_port(config: MetricsConfig) -> None:
    """Refuses a port that is taken, before anything is started.

    Raises:
        RefusedError: the address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.host, config.port))
            probe.listen(1)
    except OSError as error:
        raise RefusedError(_message(config, error)) from error


class Endpoint:
    """An HTTP server with the metrics under /metrics, for as long as it is open.

    Args:
        targets: a file in the format of Prometheus's file-based service discovery that names the address while the
            run goes on, so that one Prometheus follows all runs of a folder.
    Raises:
        RunError: the address cannot be listened at.
    """

    def __init__(self, config: MetricsConfig, registry: CollectorRegistry, targets: Path, run: str) -> None:
        try:
            self._server, self._thread = start_http_server(config.port, config.host, registry)
        except OSError as error:
            raise RunError(_message(config, error)) from error
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.address = f"{host}:{self._server.server_port}"
        self._targets = targets
        entry: list[dict[str, Any]] = [{"targets": [self.address], "labels": {"run": run}}]
        targets.parent.mkdir(exist_ok=True)
        targets.write_text(json.dumps(entry) + "\n")

    def close(self) -> None:
        self._targets.unlink(missing_ok=True)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _message(config: MetricsConfig, error: OSError) -> str:
    return (
        f"metrics.port must be free to listen at on metrics.host {config.host}, got {config.port}: {error.strerror}; "
        "choose another, or 0 for any free one"
    )
