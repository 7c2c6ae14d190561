"""What can be said of the Dockerfile without a registry: its paths, names and versions are those of the repository.

The images themselves are not built here.
"""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from deploy.k8s.values import RAY_VERSION

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "docker" / "Dockerfile"


def instructions() -> list[tuple[str, str, str]]:
    """(stage, instruction, its text), continued lines joined."""
    found, stage = [], ""
    lines = [line for line in FILE.read_text().splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stage = rest.rpartition(" AS ")[2]
        found.append((stage, name, rest))
    return found


def test_every_file_that_is_copied_is_in_the_repository_and_everything_the_wheel_needs_is_copied() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a checkout of git, what would be copied is not known")
    names = set(tracked.stdout.split())
    copied = set()
    for stage, name, rest in instructions():
        if name != "COPY" or rest.startswith("--from"):
            continue
        *sources, _ = shlex.split(rest)
        for source in sources:
            assert any(n == source or n.startswith(f"{source}/") for n in names), source
            if stage == "wheel":
                copied.add(source)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *wheel["packages"], *wheel["force-include"]}
    assert needed <= copied


def test_the_image_has_the_ray_of_the_manifests_and_of_the_lock() -> None:
    text = FILE.read_text()
    (version,) = re.findall(r"^ARG RAY_VERSION=(\S+)$", text, re.MULTILINE)
    locked = re.findall(r"^ray(?:\[\w+\])?==(\S+)$", (ROOT / "requirements" / "cpu.lock").read_text(), re.MULTILINE)
    assert [version] == [RAY_VERSION] == locked
    installs = [rest for stage, name, rest in instructions() if name == "RUN" and stage in ("cpu", "gpu")]
    assert len(installs) == 2
    assert all('"ray==${RAY_VERSION}"' in rest for rest in installs)


def test_the_extras_and_stages_that_are_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\[(\w+)\]", FILE.read_text())) <= extras.keys()
    stages = {stage for stage, _, _ in instructions() if stage}
    assert set(re.findall(r"--from=(\w+)", FILE.read_text())) <= stages
    assert set(re.findall(r"--target (\w+)", FILE.read_text())) == {"cpu", "gpu"} < stages


def test_nothing_runs_as_root_after_the_base_image() -> None:
    assert not [rest for stage, name, rest in instructions() if name == "USER" and stage != "wheel"]
