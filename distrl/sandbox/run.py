"""Runs programs in the sandbox, and tests of programs in two."""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distrl.errors import StageError
from distrl.sandbox.bubblewrap import check_sandbox, command, place
from distrl.sandbox.limits import SandboxConfig

Ending = Literal["exit", "time", "output"]

_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program."""

    ending: Ending
    """`exit`: it ended by itself; `time`, `output`: it was ended at that limit."""
    status: int
    """Its exit status where it ended by itself; 128 and more is a signal."""
    stdout: str
    stderr: str


class Sandbox:
    """Runs programs within limits; may be used by several threads.

    Args:
        setting: what needs it, for messages.
    Raises:
        ConfigError: there is no sandbox here, and the limits do not allow to go without.
    """

    def __init__(self, limits: SandboxConfig, *, setting: str = "sandbox") -> None:
        self.limits = limits
        self._sandboxed = check_sandbox(limits, setting=setting)

    def run(self, program: str, stdin: str = "") -> Outcome:
        """Runs a Python program with the standard streams."""
        with self._files({"program.py": program}) as files:
            mode = ["run", place("program.py", files["program.py"], sandboxed=self._sandboxed)]
            process = self._start(mode, files, stdin=subprocess.PIPE)
            return self._communicate(process, stdin.encode(errors="replace"), time.monotonic() + self.limits.timeout_s)

    def check(self, program: str, test: str, entry_point: str = "", context: str = "") -> tuple[bool, str | None]:
        """Whether a program passes tests that call its functions, and why not.

        Args:
            test: Python; with an entry point, it may define `check(candidate)`, which is called with that function of
                the program. Without, names that the tests do not define are the program's functions.
            context: Python that runs before the tests, beside them and away from the program.
        Raises:
            StageError: the tests' own process ended without a verdict.
        """
        tests = json.dumps({"test": test, "entry_point": entry_point, "context": context})
        ours, theirs = socket.socketpair()
        with self._files({"program.py": program, "tests.json": tests}) as files, ours, theirs:
            deadline = time.monotonic() + self.limits.timeout_s
            serving = self._serve("serve", "program.py", files, theirs)
            try:
                checking = self._serve("check", "tests.json", files, ours)
                theirs.close()
                ours.close()
                outcome = self._communicate(checking, b"", deadline)
            finally:
                _kill(serving)
        if outcome.ending == "time":
            return False, f"the tests must end within sandbox.timeout_s = {self.limits.timeout_s:g} s"
        try:
            verdict = json.loads(outcome.stdout)
            return bool(verdict["passed"]), verdict["reason"]
        except (ValueError, KeyError, TypeError):
            raise StageError(
                f"sandbox: the process of the tests ended without a verdict, with status {outcome.status}: "
                f"{outcome.stderr.strip()[-200:]}"
            ) from None

    def _serve(self, mode: str, name: str, files: dict[str, Path], end: socket.socket) -> "subprocess.Popen[bytes]":
        mine = {name: files[name]}  # the program must not see the tests
        arguments = [mode, place(name, files[name], sandboxed=self._sandboxed), str(end.fileno())]
        return self._start(arguments, mine, stdin=subprocess.DEVNULL, fds=(end.fileno(),))

    def _start(
        self, mode: list[str], files: dict[str, Path], *, stdin: int, fds: tuple[int, ...] = ()
    ) -> "subprocess.Popen[bytes]":
        serves = mode[0] == "serve"
        return subprocess.Popen(
            command(mode, files, self.limits, sandboxed=self._sandboxed),
            stdin=stdin,
            stdout=subprocess.DEVNULL if serves else subprocess.PIPE,
            stderr=subprocess.DEVNULL if serves else subprocess.PIPE,
            pass_fds=fds,
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin")},
            start_new_session=True,
        )

    @contextmanager
    def _files(self, contents: dict[str, str]) -> Iterator[dict[str, Path]]:
        with tempfile.TemporaryDirectory(prefix="distrl-sandbox-") as folder:
            files = {}
            for name, content in contents.items():
                files[name] = Path(folder, name)
                files[name].write_text(content, errors="replace")
                files[name].chmod(0o444)
            yield files

    def _communicate(self, process: "subprocess.Popen[bytes]", stdin: bytes, deadline: float) -> Outcome:
        """Feeds and reads the process until it ends or meets a limit; then it is gone."""
        streams = {process.stdout: bytearray(), process.stderr: bytearray()}
        ending: Ending = "exit"
        try:
            with selectors.DefaultSelector() as selector:
                for stream in streams:
                    assert stream is not None
                    selector.register(stream, selectors.EVENT_READ)
                if process.stdin is not None:
                    os.set_blocking(process.stdin.fileno(), False)
                    selector.register(process.stdin, selectors.EVENT_WRITE)
                while selector.get_map():
                    left_s = deadline - time.monotonic()
                    if left_s <= 0:
                        ending = "time"
                        break
                    for key, _ in selector.select(left_s):
                        if key.fileobj is process.stdin:
                            stdin = _feed(selector, process, stdin)
                        elif block := os.read(key.fd, _BLOCK):
                            streams[key.fileobj] += block  # type: ignore[index]
                        else:
                            selector.unregister(key.fileobj)
                    if sum(map(len, streams.values())) > self.limits.output_bytes:
                        ending = "output"
                        break
            if ending == "exit":
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    ending = "time"
        finally:
            _kill(process)
        texts = [bytes(s[: self.limits.output_bytes]).decode(errors="replace") for s in streams.values()]
        return Outcome(ending, process.returncode, *texts)


def _feed(selector: selectors.BaseSelector, process: "subprocess.Popen[bytes]", stdin: bytes) -> bytes:
    assert process.stdin is not None
    written = 0
    with contextlib.suppress(BrokenPipeError):
        written = os.write(process.stdin.fileno(), stdin[:_BLOCK]) if stdin else 0
    if not written:
        selector.unregister(process.stdin)
        process.stdin.close()
        return b""
    return stdin[written:]


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Ends the process with all that it started: they share its session, and in a sandbox its process namespace."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
