"""The learner's side: keeps the newest weights in memory, and starts a sender for every receiver that connects."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.transfer.child import bounded, end_with_parent, start_child
from actors.transfer.planes import Plane, Sending, known_plane, sending
from actors.transfer.snapshot import Snapshots, opened
from distrl.errors import StageError
from distrl.messages import Manifest, Offer


class TransferSource:
    """Offers what is published last. The learner's own thread copies weights into memory and does nothing else.

    Args:
        host: the address that generation actors reach this machine at.
        node: Ray's id of it.
        timeout_s: seconds that a sender may take for one update before it ends itself.
    """

    def __init__(self, plane: Plane, host: str, node: str, timeout_s: float) -> None:
        self._plane = plane
        self._host = host
        self._timeout_s = timeout_s
        self._snapshots = Snapshots()
        key = secrets.token_bytes(32)
        self._listening = socket.create_server((host, 0))
        port = int(self._listening.getsockname()[1])
        self.offer = Offer(plane, host, port, key, node, os.getpid())
        self.senders: list[subprocess.Popen[bytes]] = []
        """One for each connection, in the order in which they came."""
        self._guard = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, name="transfer-source", daemon=True).start()

    def put(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From here on this version is sent to who asks; returns copies of the tensors that do not change."""
        return self._snapshots.put(manifest.weights, manifest.version, tensors)

    def close(self) -> None:
        with self._guard:
            self._closed = True
            for process in self.senders:
                process.kill()
                process.wait()
        # Closing alone would leave a thread that waits for a connection waiting for one more.
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._snapshots.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listening.accept()
            except OSError:
                return
            # A thread for each: one that stops in the middle of the handshake holds up nobody.
            threading.Thread(target=self._welcome, args=(Connection(peer.detach()),), daemon=True).start()

    def _welcome(self, connection: Connection) -> None:
        with connection:
            try:
                deliver_challenge(connection, self.offer.key)
                answer_challenge(connection, self.offer.key)
            except (OSError, EOFError, AuthenticationError):
                return  # not one of the run's processes, or one that ended meanwhile
            with self._guard:
                if self._closed:
                    return
                # A receiver that is gone has ended its sender.
                self.senders = [process for process in self.senders if process.poll() is None]
                arguments = (self._plane, self._host, str(self._timeout_s), str(self._snapshots.directory))
                self.senders.append(start_child(__name__, connection, *arguments))


class _Asked:
    """Calls of the sending side that the receiver answers over the connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._ask("init", init_info)

    def update_weights(self, update_info: Any) -> None:
        self._ask("update", update_info)

    def _ask(self, what: str, info: Any) -> None:
        self._connection.send((what, info))
        answer = self._connection.recv()
        if answer is not None:
            raise StageError(answer)


def serve(connection: Connection, plane: Plane, host: str, timeout_s: float, directory: Path) -> None:
    """Answers one receiver until it goes away. A failure ends the connection: who knows in which state the plane is."""
    link: Sending | None = None
    client = _Asked(connection)
    while True:
        try:
            weights, version, names = connection.recv()
        except EOFError:
            return
        with bounded(timeout_s):
            try:
                tensors = opened(directory, weights, version, names)
                if link is None:
                    link = sending(plane, client, host, timeout_s)
                link.send(tensors)
            except Exception as error:
                connection.send(("failed", f"{type(error).__name__}: {error}"))
                raise
            connection.send(("sent", None))


def main() -> None:
    fd, parent, plane, host, timeout_s, directory = sys.argv[1:]
    end_with_parent(int(parent))
    with Connection(int(fd)) as connection:
        serve(connection, known_plane(plane), host, float(timeout_s), Path(directory))


if __name__ == "__main__":
    main()
