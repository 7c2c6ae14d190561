"""Finds a run's processes on this machine, and what they are doing."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.process_table import read_processes
from deploy.run_dir import RunDir
from deploy.run_state import driver_pid

CLASSES = {
    "generation": "GenerationActor",
    "grading": "GradingActor",
    "reference": "ReferenceActor",
    "journal": "JournalActor",
    "replay": "ReplayActor",
    "learner": "RayTrainWorker",
    "coordinator": "CoordinatorActor",
}
"""By stage: how Ray names the processes of its actors."""


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    title: str
    state: str = "S"
    """As the kernel has it: R runs, S sleeps, D waits for a device, T is stopped, Z has ended."""

    @property
    def odd(self) -> str:
        """What is not as it should be with a process in this state, and what to do; empty where nothing is."""
        match self.state:
            case "T" | "t":
                return f"it is stopped, by SIGSTOP or a debugger: kill -CONT {self.pid} lets it go on"
            case "D":
                return "it waits for a device: look at the disk or network file system that its stack names"
            case "Z":
                return "it has ended, and its parent has not noticed"
        return ""


def processes() -> Iterator[Process]:
    """All processes of this machine that may be read."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has just ended
        yield Process(int(folder.name), int(parent), title, state)


def of_run(run_dir: RunDir, stage: str) -> list[Process]:
    """The processes of a stage on this machine, whether the driver started their Ray or somebody else did."""
    here = socket.gethostname()
    named = {r["pid"] for r in read_processes(run_dir) if r["stage"] == stage and r.get("host") == here}
    # Of a learner the table has the first worker only.
    descended = of_stage(stage, driver_pid(run_dir))
    found = {p.pid: p for p in processes() if p.pid in named and p.title.startswith("ray::")}
    return list((found | {p.pid: p for p in descended}).values())


def of_stage(stage: str, driver: int) -> list[Process]:
    """The processes of a stage that descend from a driver: those of its own Ray."""
    everybody = {p.pid: p for p in processes()}
    wanted = CLASSES.get(stage)
    return [
        p
        for p in everybody.values()
        if wanted and p.title.startswith(f"ray::{wanted}") and _descends(p, driver, everybody)
    ]


def _descends(process: Process, ancestor: int, everybody: dict[int, Process]) -> bool:
    seen = set()
    while process.pid not in seen:
        if process.pid == ancestor:
            return True
        seen.add(process.pid)
        parent = everybody.get(process.parent)
        if parent is None:
            return False
        process = parent
    return False


def stack(pid: int, timeout_s: float = 20.0) -> str:
    """The Python stack of a process, by py-spy, which neither stops nor changes it; or why there is none."""
    beside = Path(sys.executable).with_name("py-spy")
    command = str(beside) if beside.exists() else shutil.which("py-spy")
    if command is None:
        return "py-spy is not installed; pip install py-spy"
    try:
        ended = subprocess.run(
            [command, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return f"py-spy did not answer within {timeout_s:g} s"
    if ended.returncode:
        why = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
        return (
            f"py-spy could not read process {pid}: {why}; call doctor as the run's user with CAP_SYS_PTRACE, or as root"
        )
    return ended.stdout
