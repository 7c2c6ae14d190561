"""An HTTP server that answers the official client as the API server of Kubernetes does, and keeps what it was sent."""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import yaml

KINDS: Mapping[str, Mapping[str, tuple[str, bool]]] = {
    "v1": {
        "Namespace": ("namespaces", False),
        "ConfigMap": ("configmaps", True),
        "PersistentVolumeClaim": ("persistentvolumeclaims", True),
        "Secret": ("secrets", True),
    },
    "scheduling.k8s.io/v1": {"PriorityClass": ("priorityclasses", False)},
    "networking.k8s.io/v1": {"NetworkPolicy": ("networkpolicies", True)},
    "policy/v1": {"PodDisruptionBudget": ("poddisruptionbudgets", True)},
    "monitoring.coreos.com/v1": {"PodMonitor": ("podmonitors", True)},
    "ray.io/v1": {"RayJob": ("rayjobs", True)},
}
"""By group and version: (plural name, whether it lives in a namespace) of each kind."""


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    query: Mapping[str, list[str]]
    kind: str
    """Content type."""
    body: Any


@dataclass
class ApiServer:
    """The objects of a cluster by path, as server-side apply makes them.

    Attributes:
        answers: (status, reason, message) by path, in place of what it would answer.
        lacking: kinds whose definition is not installed.
    """

    answers: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    lacking: frozenset[str] = frozenset()
    requests: list[Request] = field(default_factory=list)
    objects: dict[str, Any] = field(default_factory=dict)
    everybody_is_a_stranger: bool = False

    def __enter__(self) -> Self:
        api = self

        class Handler(_Handler):
            server_state = api

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def applied(self) -> list[Any]:
        """Bodies that were sent to be applied, in order."""
        return [r.body for r in self.requests if r.method == "PATCH"]

    def answer(self, request: Request) -> tuple[int, Any]:
        if self.everybody_is_a_stranger:
            return self._status(401, "Unauthorized", "Unauthorized")
        found = _discovery(request.path, self.lacking)
        if found is not None:
            return 200, found
        if request.path in self.answers:
            return self._status(*self.answers[request.path])
        if request.method == "PATCH":
            new = request.path not in self.objects
            self.objects[request.path] = request.body
            return 201 if new else 200, request.body
        if request.method == "GET" and request.path in self.objects:
            return 200, self.objects[request.path]
        plural, name = request.path.rsplit("/", 2)[1:]
        return self._status(404, "NotFound", f'{plural} "{name}" not found')

    @staticmethod
    def _status(code: int, reason: str, message: str) -> tuple[int, Any]:
        said = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message}
        return code, {**said, "reason": reason, "code": code}


def _discovery(path: str, lacking: frozenset[str]) -> Any:
    """What a client asks to learn which kinds there are; None for another path."""
    groups = [version for version in KINDS if "/" in version]
    if path == "/version":
        return {"major": "1", "minor": "35", "gitVersion": "v1.35.0"}
    if path == "/apis":
        entries = [
            {"name": g, "versions": [one := {"groupVersion": f"{g}/{v}", "version": v}], "preferredVersion": one}
            for g, v in (version.split("/") for version in groups)
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": entries}
    version = path.removeprefix("/apis/") if path.startswith("/apis/") else path.removeprefix("/api/")
    if version not in KINDS:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update"]
    resources = [
        {"name": plural, "singularName": "", "namespaced": namespaced, "kind": kind, "verbs": verbs}
        for kind, (plural, namespaced) in KINDS[version].items()
        if kind not in lacking
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


class _Handler(BaseHTTPRequestHandler):
    server_state: ApiServer

    def _any(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        address = urlsplit(self.path)
        body = yaml.safe_load(self.rfile.read(size)) if size else None
        path = address.path.rstrip("/")
        request = Request(self.command, path, parse_qs(address.query), self.headers.get("Content-Type", ""), body)
        self.server_state.requests.append(request)
        status, answer = self.server_state.answer(request)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._any()

    def do_PATCH(self) -> None:
        self._any()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def kubeconfig(file: Path, url: str) -> Path:
    """A kubeconfig whose contexts `here` and `elsewhere` name this server and one that is not there."""
    servers = {"here": url, "elsewhere": "http://127.0.0.1:1"}
    values = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": name, "cluster": {"server": server}} for name, server in servers.items()],
        "users": [{"name": "me", "user": {"token": "mine"}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": "me"}} for name in servers],
    }
    file.write_text(yaml.safe_dump(values))
    return file
