"""A server that speaks S3, as a process on loopback."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

SERVER = Path(sys.prefix).with_name(".venv-s3") / "bin" / "moto_server"
BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}

needs_server = pytest.mark.skipif(not SERVER.is_file(), reason=f"{SERVER} is not there; make setup-s3 makes it")


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """Address of an empty bucket, as `storage.uri` takes it."""
    with s3_server_process(log) as (address, _):
        yield address


@contextlib.contextmanager
def s3_server_process(log: Path) -> "Iterator[tuple[str, subprocess.Popen[bytes]]]":
    """As `s3_server`, with its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as out:
        # The bundled keys: what the machine has of its own must not be asked for.
        environment = {**os.environ, **KEYS}
        process = subprocess.Popen(
            [str(SERVER), "-H", "127.0.0.1", "-p", str(port)], stdout=out, stderr=out, env=environment
        )
        try:
            _wait(port, process, log)
            endpoint = f"127.0.0.1:{port}"
            fs.S3FileSystem(
                endpoint_override=endpoint, scheme="http", region="us-east-1", allow_bucket_creation=True
            ).create_dir(BUCKET)
            yield f"s3://{BUCKET}/runs?scheme=http&region=us-east-1&endpoint_override={endpoint}", process
        finally:
            process.kill()
            process.wait()


def _wait(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")
