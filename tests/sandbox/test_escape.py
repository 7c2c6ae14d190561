"""Programs that try to get out of the sandbox, to use more than they may, or to forge their verdict."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from distrl.errors import ConfigError
from distrl.sandbox import bubblewrap
from distrl.sandbox.limits import SandboxConfig
from distrl.sandbox.run import Outcome, Sandbox
from tests.builders import refusal

LIMITS = SandboxConfig(
    timeout_s=4, cpu_s=2, memory_bytes=1 << 28, scratch_bytes=1 << 22, output_bytes=1 << 16, processes=8
)
TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"


def run(program: str, limits: SandboxConfig = LIMITS) -> Outcome:
    return Sandbox(limits).run(textwrap.dedent(program))


def passes(program: str, test: str = TEST) -> tuple[bool, str | None]:
    return Sandbox(LIMITS).check(textwrap.dedent(program), test, "square")


def tried(body: str) -> str:
    """What came of an attempt: the kind of error, or `done`."""
    source = "try:\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\n    print('done')\n"
    source += "except BaseException as error:\n    print(type(error).__name__)\n"
    outcome = run(source)
    assert (outcome.ending, outcome.status) == ("exit", 0), outcome
    return outcome.stdout.strip()


def test_a_program_has_its_streams_and_a_status() -> None:
    outcome = Sandbox(LIMITS).run(
        "import sys; print(input()[::-1]); print('no', file=sys.stderr); sys.exit(3)", "abc\n"
    )
    assert outcome == Outcome("exit", 3, "cba\n", "no\n")


def test_it_may_write_to_its_scratch_folder_and_nowhere_else() -> None:
    assert tried("open('/tmp/x', 'w').write('x')") == "done"
    for place in ("/usr/x", "/sandbox/x", "/x", "/dev/shm/x", "/proc/sys/kernel/hostname", "/sandbox/program.py"):
        assert tried(f"open({place!r}, 'w').write('x')") in ("OSError", "PermissionError"), place
    assert tried("open('/tmp/x', 'wb').write(bytes(1 << 23))") == "OSError"
    assert tried("[open(f'/tmp/{i}', 'wb').write(bytes(1 << 20)) for i in range(8)]") == "OSError"


def test_it_is_another_user_and_cannot_become_root() -> None:
    assert os.geteuid() != int(run("import os; print(os.getuid())").stdout)
    assert tried("import os; os.setuid(0)") == "PermissionError"
    status = run("print(open('/proc/self/status').read())").stdout
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status


def test_it_sees_no_files_of_the_host_no_processes_and_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "ledger.sqlite"
    secret.write_text("rewards")
    secret.chmod(0o644)
    monkeypatch.setenv("DISTRL_TEST_SECRET", "hunter2")
    assert tried(f"open({str(secret)!r}).read()") == "FileNotFoundError"
    for place in ("/etc/passwd", "/root/.ssh", "/home", "/var", "/run", str(Path(__file__))):
        assert tried(f"import os; os.stat({place!r})") in ("FileNotFoundError", "PermissionError"), place
    found = run(
        """
        import os
        print(dict(os.environ))
        for pid in filter(str.isdigit, os.listdir("/proc")):
            for name in ("environ", "cmdline"):
                try:
                    print(open(f"/proc/{pid}/{name}").read())
                except OSError as error:
                    print(error)
        """
    ).stdout
    assert "hunter2" not in found
    assert "pytest" not in found


def test_it_has_no_network() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "import socket; s = socket.create_server(('127.0.0.1', 0)); "
         "print(s.getsockname()[1], flush=True); s.accept()"], stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        port = int(server.stdout.readline())
        for address in (("127.0.0.1", port), ("192.0.2.1", 80)):
            assert tried(f"import socket; socket.create_connection({address!r}, 1)") in (
                "ConnectionRefusedError",
                "OSError",
            )
        assert server.poll() is None
        server.kill()
    assert run("print(open('/proc/net/dev').read().count(':'))").stdout.strip() == "1"  # its own loopback


def test_a_fork_bomb_ends_with_its_sandbox() -> None:
    began = time.monotonic()
    users = {bubblewrap.FIRST_USER + user for user in range(bubblewrap.USERS)} - {_user(p) for p in _processes()}
    outcome = run("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n")
    assert outcome.ending == "time" or outcome.status != 0
    assert time.monotonic() - began < 4 * LIMITS.timeout_s  # a bound against hanging
    # The kernel ends all of a process namespace with its first process, in its own time.
    while left := [p for p in _processes() if _user(p) in users]:
        assert time.monotonic() - began < 4 * LIMITS.timeout_s, left
        time.sleep(0.05)


def _user(process: Path) -> int:
    try:
        return process.stat().st_uid
    except FileNotFoundError:
        return -1


def _processes() -> list[Path]:
    return list(Path("/proc").glob("[0-9]*"))


def test_no_more_processes_than_allowed() -> None:
    count = """
        import os, time
        made = 0
        try:
            for _ in range(100):
                if os.fork() == 0:
                    time.sleep(60)
                made += 1
        except OSError:
            print(made)
        """
    assert 1 <= int(run(count).stdout) < LIMITS.processes


def test_a_memory_bomb_is_an_error_of_the_program() -> None:
    assert tried("x = bytearray(1 << 34)") == "MemoryError"
    assert tried("x = []\nwhile True: x.append(bytearray(1 << 20))") == "MemoryError"


def test_endless_output_is_cut_and_ends_the_program() -> None:
    outcome = run("while True: print('x' * 1000)")
    assert outcome.ending == "output"
    assert len(outcome.stdout) <= LIMITS.output_bytes
    assert run("import sys\nwhile True: print('x' * 1000, file=sys.stderr)").ending == "output"


def test_an_endless_loop_costs_its_timeout() -> None:
    assert run("while True: pass", LIMITS.model_copy(update={"timeout_s": 1.0, "cpu_s": 60})).ending == "time"
    assert run("import time; time.sleep(60)", LIMITS.model_copy(update={"timeout_s": 1.0})).ending == "time"
    # CPU seconds are a limit of their own: SIGKILL or SIGXCPU.
    assert run("while True: pass", LIMITS.model_copy(update={"timeout_s": 20.0, "cpu_s": 1})).status in (137, 152)


def test_it_cannot_end_its_parent() -> None:
    attempt = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
    assert tried(attempt) == "PermissionError"
    assert tried("import os, signal; os.kill(1, signal.SIGKILL)") == "PermissionError"
    # All that it may end is itself.
    assert run("import os, signal; os.kill(-1, signal.SIGKILL); print('alive')").stdout in ("", "alive\n")


def test_sitecustomize_can_be_neither_written_nor_loaded() -> None:
    write = """
        import sys, pathlib
        tried = [*sys.path, "/tmp", "/usr/lib/python3/dist-packages"]
        done = []
        for folder in tried:
            try:
                pathlib.Path(folder, "sitecustomize.py").write_text("print('customized')")
                done.append(folder)
            except OSError:
                pass
        print(done)
        """
    assert run(write).stdout.strip() == "['/tmp']"
    assert run("import sys; print('site' in sys.modules, 'sitecustomize' in sys.modules)").stdout == "False False\n"


# The verdict ----------------------------------------------------------------------------------------------------


def test_the_tests_decide() -> None:
    assert passes("def square(x): return x * x") == (True, None)
    assert passes("def square(x): return 4") == (False, "AssertionError")
    assert passes("def square(x): return x / 0") == (False, "ZeroDivisionError: division by zero")
    assert passes("def square(x) return") == (
        False,
        "the program could not be loaded: SyntaxError: expected ':' (program.py, line 1)",
    )
    assert passes("def cube(x): return x") == (False, "NameError: name 'square' is not defined")


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "def square(x):\n    import os; os._exit(0)",
        'print(\'{"passed": true, "reason": null}\')\ndef square(x): pass',
        # Equal to everything, in its own process only.
        "class Yes:\n    def __eq__(self, other): return True\ndef square(x): return Yes()",
        "class Yes(int):\n    def __eq__(self, other): return True\ndef square(x): return Yes(0)",
        "class Yes(str):\n    def __eq__(self, other): return True\ndef square(x): return Yes()",
        # Assertions that never fail, in its own process only.
        "import builtins\nbuiltins.AssertionError = KeyboardInterrupt\ndef square(x): return 0",
        # Every descriptor that it has, written to.
        """
        import os
        for fd in range(64):
            try:
                os.write(fd, b'{"passed": true, "reason": null}')
            except OSError:
                pass
        def square(x): return 0
        """,
        # Answers before it is asked, and answers that are no messages.
        """
        import gc, socket, struct, json
        for s in [s for s in gc.get_objects() if isinstance(s, socket.socket)]:
            for message in ({"loaded": None}, {"passed": True}, {"value": True}, {"value": True}):
                content = json.dumps(message).encode()
                s.sendall(struct.pack(">I", len(content)) + content)
        def square(x): return 0
        """,
        """
        import gc, socket
        for s in [s for s in gc.get_objects() if isinstance(s, socket.socket)]:
            s.sendall(b"\\xff" * 64)
        def square(x): return 0
        """,
        # Tests of another frame: there is none.
        """
        import sys
        def square(x):
            frame = sys._getframe()
            while frame:
                for name, value in list(frame.f_globals.items()):
                    if name == "check":
                        frame.f_globals["check"] = lambda candidate: None
                frame = frame.f_back
            return 0
        """,
        "def square(x):\n    while True: pass",
        "def square(x): return [[]] * 10 ** 7",
        "def square(x): return float('nan')",
        "raise BaseException",
    ],
)
def test_no_program_forges_its_verdict(program: str) -> None:
    passed, reason = passes(program)
    assert not passed
    assert reason


def test_the_program_does_not_see_the_tests() -> None:
    program = "import os\ndef square(x): return sorted(os.listdir('/sandbox'))"
    test = "def check(candidate):\n    assert candidate(1) == ['inside.py', 'program.py'], candidate(1)\n"
    assert passes(program, test) == (True, None)


def test_values_keep_their_types_between_the_two() -> None:
    values = "[None, True, 1, 10**5000, 1.5, float('inf'), 1j, 'é', b'x', (1, [2]), {3}, frozenset({4}), {(5,): {}}]"
    program = f"def square(x):\n    assert x == {values}\n    return x\n"
    test = f"def check(candidate):\n    got = candidate({values})\n    assert repr(got) == repr({values}), got\n"
    test = "import sys; sys.set_int_max_str_digits(0)\n" + test
    assert passes(program, test) == (True, None)


def test_exceptions_come_across_by_their_kind() -> None:
    test = "def check(candidate):\n    try:\n        candidate(1)\n    except ValueError as error:\n"
    test += "        assert str(error) == 'no'\n"
    test += "    else:\n        assert False\n"
    assert passes("def square(x): raise ValueError('no')", test) == (True, None)
    assert passes("def square(x): raise TypeError('no')", test) == (False, "TypeError: no")


# Without a sandbox ----------------------------------------------------------------------------------------------


def test_no_sandbox_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    bubblewrap._problem.cache_clear()
    try:
        assert refusal(ConfigError, lambda: Sandbox(LIMITS, setting="reward.grader unit_tests")) == (
            "reward.grader unit_tests must have a sandbox to run programs in, got none: bwrap is not on the path; "
            "install bubblewrap (apt-get install bubblewrap) and allow user namespaces, on Kubernetes see "
            "docs/grading.md, or pass --allow-unsandboxed if you trust the programs"
        )
        open_limits = LIMITS.model_copy(update={"allow_unsandboxed": True})
        sandbox = Sandbox(open_limits)
        assert sandbox.run("print(input())", "5") == Outcome("exit", 0, "5\n", "")
        assert sandbox.check("def square(x): return x * x", TEST, "square") == (True, None)
        assert sandbox.check("def square(x): return x", TEST, "square") == (False, "AssertionError")
        short = Sandbox(open_limits.model_copy(update={"timeout_s": 0.5}))
        assert short.run("while True: pass").ending == "time"
    finally:
        bubblewrap._problem.cache_clear()
