"""A judge whose model distrl serves itself, with vLLM, beside the grading actor."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distrl.errors import ConfigError, DataError, StageError
from distrl.graders.endpoint import PROMPT, Endpoint
from distrl.graders.preference import WinRate
from distrl.graders.reward_model import content_version

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem

MODEL = "judge"
"""Its name at the server."""

POLL_S = 0.25


class ServedJudge(WinRate):
    """Win rates by a `ServedModel`, whose arguments it has; `opponents` and `parallel` as for `WinRate`."""

    def __init__(
        self,
        path: str,
        engine_args: Mapping[str, object] | None = None,
        prompt: str = PROMPT,
        opponents: int = 1,
        parallel: int = 4,
        timeout_s: float = 30.0,
        start_timeout_s: float = 300.0,
        max_tokens: int = 512,
    ) -> None:
        served = ServedModel(path, engine_args, prompt, timeout_s, start_timeout_s, max_tokens)
        super().__init__(served, opponents, parallel)


class ServedModel:
    """A chat model that says which of two responses is better; see `distrl.graders.endpoint.Endpoint`.

    The server listens on 127.0.0.1 alone and ends with this process.

    Args:
        path: Hugging Face directory of a causal language model with its tokenizer and chat template.
        engine_args: further options of `vllm serve`, without their dashes.
        timeout_s: of one request. start_timeout_s: until the server answers.
    Raises:
        DataError: there is no model. ConfigError: vLLM is not installed.
        StageError: the server ended, or was not up in time; the message has the end of what it wrote.
    """

    def __init__(
        self,
        path: str,
        engine_args: Mapping[str, object] | None = None,
        prompt: str = PROMPT,
        timeout_s: float = 30.0,
        start_timeout_s: float = 300.0,
        max_tokens: int = 512,
    ) -> None:
        if not (Path(path) / "config.json").is_file():
            raise DataError(
                f"options.path of the grader served_judge must be a Hugging Face directory, got {path!r} without a "
                "config.json; check the path"
            )
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "the grader served_judge must find vLLM in this environment, found none; install it, or use the grader "
                "judge with the address of a server"
            )
        port = _free_port()
        self._server = _start(Path(path), port, engine_args or {})
        try:
            self._server.wait_until_up(port, start_timeout_s)
        except BaseException:
            self._server.close()
            raise
        endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", MODEL, "", prompt, timeout_s, 3, max_tokens)
        self._endpoint = endpoint
        # Of what decides, and not of the port.
        self.version = f"{content_version(Path(path))}/{endpoint.prompt_version}"

    def prefer(self, problem: "Problem", first: str, second: str) -> float:
        return self._endpoint.prefer(problem, first, second)

    def close(self) -> None:
        """Ends the server. What it wrote is kept only where it could not be started."""
        self._server.close()
        self._server.remove_log()


class _Server:
    def __init__(self, process: "subprocess.Popen[bytes]", pipe: int, log: Path) -> None:
        self._process, self._pipe, self._log = process, pipe, log

    def wait_until_up(self, port: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            if (status := self._process.poll()) is not None:
                raise StageError(f"the server of served_judge ended with status {status}: {self._said()}")
            with (
                contextlib.suppress(OSError),  # nobody listens yet, or answers 503
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=POLL_S * 4),
            ):
                return
            if time.monotonic() > deadline:
                raise StageError(
                    f"the server of served_judge must be up within options.start_timeout_s = {timeout_s:g} s, it was "
                    f"not: {self._said()}"
                )
            time.sleep(POLL_S)

    def _said(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it wrote nothing'} (all of it: {self._log})"

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._pipe)  # which tells it to end
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10.0)
        self._process.kill()
        self._process.wait()

    def remove_log(self) -> None:
        self._log.unlink(missing_ok=True)


def _start(path: Path, port: int, engine_args: Mapping[str, object]) -> _Server:
    theirs, ours = os.pipe()
    handle, name = tempfile.mkstemp(prefix="distrl-judge-", suffix=".log")
    arguments = ["--model", str(path), "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "distrl.graders.serve", str(theirs), *arguments, *_flags(engine_args)],
            pass_fds=[theirs],
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
        )
    finally:
        os.close(theirs)
        os.close(handle)
    return _Server(process, ours, Path(name))


def _flags(engine_args: Mapping[str, object]) -> list[str]:
    """`max_model_len: 512` is `--max-model-len 512`, `enforce_eager: true` is `--enforce-eager`."""
    flags = []
    for name, value in engine_args.items():
        flag = "--" + name.replace("_", "-")
        if value is False:
            flag = "--no-" + name.replace("_", "-")
        flags += [flag] if isinstance(value, bool) else [flag, str(value)]
    return flags


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
