"""What a judge that serves its model refuses, and how its server's process ends."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distrl.errors import ConfigError, DataError, StageError
from distrl.graders.served import ServedJudge, _flags
from tests.builders import DEADLINE_S, refusal


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    assert refusal(DataError, lambda: ServedJudge(str(tmp_path))) == (
        f"options.path of the grader served_judge must be a Hugging Face directory, got {str(tmp_path)!r} without a "
        "config.json; check the path"
    )


def test_an_environment_without_vllm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal(ConfigError, lambda: ServedJudge(str(tmp_path))) == (
        "the grader served_judge must find vLLM in this environment, found none; install it, or use the grader judge "
        "with the address of a server"
    )


def test_a_server_that_ends_or_is_late_is_told_with_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the server a program that says something and ends, or stays without listening."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "vllm")
    program = tmp_path / "python"
    monkeypatch.setattr("sys.executable", str(program))
    where = r" \(all of it: \S+distrl-judge-\S+\.log\)$"

    program.write_text("#!/bin/sh\necho first; echo unrecognized arguments: --no-such-option; exit 2\n")
    program.chmod(0o755)
    message = refusal(StageError, lambda: ServedJudge(str(tmp_path), {"no_such_option": 3}))
    said = "the server of served_judge ended with status 2: unrecognized arguments: --no-such-option"
    assert re.fullmatch(re.escape(said) + where, message)

    program.write_text("#!/bin/sh\necho loading\nexec sleep 600\n")
    message = refusal(StageError, lambda: ServedJudge(str(tmp_path), start_timeout_s=0.5))
    said = "the server of served_judge must be up within options.start_timeout_s = 0.5 s, it was not: loading"
    assert re.fullmatch(re.escape(said) + where, message)


def test_arguments_of_the_engine_become_options_of_the_command() -> None:
    found = _flags({"max_model_len": 512, "enforce_eager": True, "enable_prefix_caching": False})
    assert found == ["--max-model-len", "512", "--enforce-eager", "--no-enable-prefix-caching"]


def test_the_server_ends_when_its_parent_is_gone() -> None:
    code = (
        "import sys, time; from distrl.graders.serve import end_with; "
        "end_with(int(sys.argv[1])); print('up', flush=True); time.sleep(600)"
    )
    theirs, ours = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code, str(theirs)], pass_fds=[theirs], stdout=subprocess.PIPE)
    os.close(theirs)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert process.poll() is None
        os.close(ours)  # what the system does when the parent is killed
        assert process.wait(DEADLINE_S) != 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
