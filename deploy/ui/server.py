"""Serves the live pages of one run on the loopback address.

The standard library's server: a handful of read-only pages for one person need no framework, and it adds nothing to
install.
"""

import threading
import time
from collections.abc import Callable
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from deploy.report.page import environment
from deploy.run_dir import RunDir
from deploy.ui import pages
from deploy.ui.index import RolloutIndex, open_index
from distrl.errors import DistrlError, RefusedError

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
"""What a page may load: its own script and styles, nothing from elsewhere."""

FRESH_S = 1.0
"""A page is made at most this often; in between, those who ask get the last one."""


class Site:
    """The pages of a run; made once per request or per FRESH_S."""

    def __init__(self, run_dir: RunDir, clock: Callable[[], float] = time.time) -> None:
        self._run_dir = run_dir
        self._clock = clock
        self._lock = threading.Lock()
        self._overview: tuple[float, str] | None = None

    @cached_property
    def _index(self) -> RolloutIndex:
        return open_index(self._run_dir)

    def close(self) -> None:
        with self._lock:
            if "_index" in self.__dict__:
                self._index.close()

    def page(self, path: str, query: dict[str, str]) -> str | None:
        """The HTML of a path; None where there is no such page."""
        with self._lock:  # one connection to the index, one reader of the run at a time
            match path.strip("/").split("/"):
                case [""]:
                    return self._fresh_overview()
                case ["rollouts"]:
                    return pages.rollouts(self._run_dir, self._index, query)
                case ["rollout", rollout_id]:
                    return pages.rollout(self._run_dir, self._index, unquote(rollout_id), query)
                case ["processes"]:
                    return pages.processes(self._run_dir, self._clock())
        return None

    def _fresh_overview(self) -> str:
        now = self._clock()
        if self._overview is None or now - self._overview[0] >= FRESH_S:
            # From the end of the making on: a large run takes longer to read than FRESH_S.
            text = pages.overview(self._run_dir)
            self._overview = (self._clock(), text)
        return self._overview[1]


class _Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        # A page elsewhere may resolve its own name to this machine, and would read the run through the browser.
        if self.headers.get("Host", "") not in self.server.names:
            self._send(HTTPStatus.FORBIDDEN, "The Host header must be this server's address.", "text/plain")
            return
        if address.path == "/follow.js":
            script, *_ = environment().loader.get_source(environment(), "follow.js")  # type: ignore[union-attr]
            self._send(HTTPStatus.OK, script, "text/javascript")
            return
        try:
            page = self.server.site.page(address.path, dict(parse_qsl(address.query)))
        except RefusedError as error:
            self._send(HTTPStatus.BAD_REQUEST, str(error), "text/plain")
        except DistrlError as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), "text/plain")
        else:
            if page is None:
                self._send(HTTPStatus.NOT_FOUND, f"There is no page {address.path}.", "text/plain")
            else:
                self._send(HTTPStatus.OK, page, "text/html")

    def _send(self, status: HTTPStatus, text: str, kind: str) -> None:
        data = text.encode("utf-8", errors="replace")
        self.send_response(status)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(data))),
            ("Content-Security-Policy", _POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: who looks at pages needs no log of it."""


class Server(ThreadingHTTPServer):
    """Listens from its making on; `serve_forever` answers.

    Raises:
        RefusedError: the address is taken.
    """

    daemon_threads = True

    def __init__(self, run_dir: RunDir, host: str, port: int) -> None:
        self.site = Site(run_dir)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise RefusedError(
                f"--port must be free to listen at on {host}, got {port}: {error.strerror}; choose another, or 0 for "
                "any free one"
            ) from error
        self.names = {f"{name}:{self.server_port}" for name in (host, "localhost", "127.0.0.1")}

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_port}/"

    def server_close(self) -> None:
        super().server_close()
        self.site.close()
