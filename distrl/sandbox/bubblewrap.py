"""The command that starts a process in a sandbox of bubblewrap, see https://github.com/containers/bubblewrap.

The process sees the system's libraries and a Python, read-only, a scratch folder in memory, and itself: no network, no
other processes, no variables of the environment, no other files. Where the caller is root, it becomes a user of its
own, who exists nowhere else, so that his processes are counted for themselves; elsewhere a user namespace makes it
nobody.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from distrl.errors import ConfigError
from distrl.sandbox.limits import SandboxConfig

INSIDE = Path(__file__).with_name("inside.py")
FIRST_USER, USERS = 231_000, 4096
"""Numbers of the users that programs run as; a range that no system assigns."""
_NOBODY = 65534
_RUNTIME_S = 20.0

_users = itertools.count(os.getpid())


def python() -> str:
    """The interpreter that runs programs: this one, outside of its virtual environment."""
    return os.path.realpath(sys.executable)


def command(
    mode: Sequence[str], files: Mapping[str, Path], limits: SandboxConfig, *, sandboxed: bool = True
) -> list[str]:
    """The command line that runs `inside.py`.

    Args:
        mode: its arguments after the limits; files are at `/sandbox/NAME`, or at their own place without a sandbox.
        files: what the process may read, by name.
    """
    user = FIRST_USER + next(_users) % USERS if sandboxed and os.geteuid() == 0 else None
    resources = {
        "RLIMIT_CPU": limits.cpu_s,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.scratch_bytes,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    if sandboxed:
        # Without a sandbox all processes of this user would be counted.
        resources["RLIMIT_NPROC"] = limits.processes
    told = json.dumps({"resources": resources, "user": user})
    inside = "/sandbox/inside.py" if sandboxed else str(INSIDE)
    arguments = [*_isolated_python(), inside, told, *mode]
    if not sandboxed:
        return arguments
    shown = {"inside.py": INSIDE, **files}
    places = [part for name, path in shown.items() for part in ("--ro-bind", str(path), f"/sandbox/{name}")]
    folder = ["--perms", "0755", "--dir", "/sandbox"]
    base = [*_isolation(user is not None), *_system(), *_scratch(limits.scratch_bytes)]
    return ["bwrap", *base, *folder, *places, *arguments]


def place(name: str, path: Path, *, sandboxed: bool) -> str:
    """Where the process finds a file."""
    return f"/sandbox/{name}" if sandboxed else str(path)


def _isolated_python() -> list[str]:
    # -I: no variables, no user's packages; -S: no site, so no sitecustomize; -B: no bytecode.
    return [python(), "-I", "-S", "-B"]


def _isolation(as_root: bool) -> list[str]:
    spaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if as_root:
        # Capabilities to become another user, which then has none.
        rights = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        rights = ["--unshare-user", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]
    clean = [
        "--clearenv",
        "--setenv",
        "PATH",
        "/usr/bin:/bin",
        "--setenv",
        "HOME",
        "/tmp",
        "--setenv",
        "LANG",
        "C.UTF-8",
    ]
    return [*spaces, *rights, *clean, "--die-with-parent", "--new-session", "--hostname", "sandbox"]


@lru_cache(maxsize=1)
def _system() -> list[str]:
    shown = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib64", "lib32"):
        path = Path("/", name)
        if path.is_symlink():
            shown += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            shown += ["--ro-bind", str(path), str(path)]
    prefix = os.path.realpath(sys.base_prefix)
    if not prefix.startswith("/usr/") and prefix != "/usr":
        # Folders that bwrap makes on the way to a mount are its own alone.
        for parent in reversed(Path(prefix).parents[:-1]):
            shown += ["--perms", "0755", "--dir", str(parent)]
        shown += ["--ro-bind", prefix, prefix]
    return [*shown, "--proc", "/proc", "--dev", "/dev"]


def _scratch(size: int) -> list[str]:
    # /dev/shm would be memory without a bound.
    hidden = ["--size", "4096", "--tmpfs", "/dev/shm"]
    return ["--perms", "1777", "--size", str(size), "--tmpfs", "/tmp", *hidden, "--chdir", "/tmp"]


def check_sandbox(limits: SandboxConfig, *, setting: str) -> bool:
    """Whether there is a sandbox.

    Args:
        setting: what needs it, for messages.
    Raises:
        ConfigError: there is none, and `sandbox.allow_unsandboxed` is not set.
    """
    problem = _problem()
    if problem is None:
        return True
    if limits.allow_unsandboxed:
        return False
    raise ConfigError(
        f"{setting} must have a sandbox to run programs in, got none: {problem}; install bubblewrap (apt-get install "
        "bubblewrap) and allow user namespaces, on Kubernetes see docs/grading.md, or pass --allow-unsandboxed if you "
        "trust the programs"
    )


@lru_cache(maxsize=1)
def _problem() -> str | None:
    """Why the sandbox does not work here; tried once per process."""
    if shutil.which("bwrap") is None:
        return "bwrap is not on the path"
    whole = command([], {}, SandboxConfig())
    start = [*whole[: whole.index(python())], *_isolated_python(), "-c", "print('inside')"]
    try:
        done = subprocess.run(start, capture_output=True, text=True, timeout=_RUNTIME_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.stdout == "inside\n" else (done.stderr.strip() or f"bwrap ended with status {done.returncode}")
