"""A whole run as the pods allow it: another user than root, no capabilities, nothing writable but the pod's volumes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from deploy.audit import audit_run
from deploy.k8s import folder
from deploy.k8s.pods import CONTAINER_SECURITY, HOME_FOLDER, POD_SECURITY
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.k8s.test_render import job

ROOT = Path(__file__).parents[2]
OWN_PLACES = ("proc", "dev", "tmp", "root", "home", "run", "shared")
"""Folders of the root that the box has its own of, or none."""
DEADLINE_S = 200.0

pytestmark = [
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not installed: apt-get install bubblewrap"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user"),
]


def head_volumes() -> list[str]:
    """Where the head's container may write, from its manifest."""
    (container,) = job(folder.overlay_objects("cpu"))["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"][
        "containers"
    ]
    mounts = [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]
    return sorted(mounts)  # parents first: /tmp before /tmp/ray


def in_a_pod(volumes: Path, command: Sequence[str]) -> list[str]:
    """A command as in the head's container: its user, its writable places, everything else read-only."""
    user = (f"--reuid={POD_SECURITY['runAsUser']}", f"--regid={POD_SECURITY['runAsGroup']}", "--clear-groups")
    assert CONTAINER_SECURITY["capabilities"] == {"drop": ["ALL"]}
    assert CONTAINER_SECURITY["allowPrivilegeEscalation"] is False
    box = ["bwrap", "--die-with-parent", "--unshare-pid", "--unshare-ipc"]
    for place in sorted(Path("/").iterdir()):
        if place.name not in OWN_PLACES and not place.is_symlink():
            box += ["--ro-bind", str(place), str(place)]
        elif place.is_symlink():
            box += ["--symlink", str(place.readlink()), str(place)]
    # Who is not root may not look into root's home, where Python may be.
    python = Path(os.path.realpath(sys.executable)).parents[1]
    if python.is_relative_to("/root"):
        box += [*_parents(python), "--ro-bind", str(python), str(python)]
    box += ["--proc", "/proc", "--dev", "/dev"]
    for path in head_volumes():
        own = volumes / path.strip("/").replace("/", "-")
        own.mkdir()
        os.chown(own, int(POD_SECURITY["runAsUser"]), int(POD_SECURITY["fsGroup"]))
        box += [*_parents(Path(path)), "--bind", str(own), path]
    # The project and its environment, which may lie where the box has a place of its own.
    for place in (ROOT, Path(sys.prefix)):
        if place.parts[1] in OWN_PLACES:
            box += [*_parents(place), "--ro-bind", str(place), str(place)]
    # The root itself, in which bwrap has made the places above.
    box += ["--remount-ro", "/", "--clearenv", "--setenv", "HOME", HOME_FOLDER, "--setenv", "PATH", os.environ["PATH"]]
    box += ["--setenv", "PYTHONPATH", str(ROOT), "--setenv", "OMP_NUM_THREADS", "1", "--chdir", HOME_FOLDER]
    return [*box, "setpriv", *user, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", *command]


def _parents(path: Path) -> list[str]:
    """Folders that lead to a mount, for anybody to go through."""
    return [word for folder in reversed(path.parents[:-1]) for word in ("--perms", "0755", "--dir", str(folder))]


@pytest.mark.ray
def test_a_run_needs_to_write_nowhere_but_to_the_volumes_of_its_pod(tmp_path: Path) -> None:
    volumes = tmp_path / "volumes"
    volumes.mkdir()
    probe = (
        "for f in / /usr /etc /root $PYTHONPATH; do test -w $f && echo $f; done; id -u; touch /tmp/a $HOME/a && echo ok"
    )
    seen = subprocess.run(in_a_pod(volumes, ["sh", "-c", probe]), capture_output=True, text=True, check=False)
    assert seen.stdout.split() == [str(POD_SECURITY["runAsUser"]), "ok"], seen.stderr
    shutil.rmtree(volumes)
    volumes.mkdir()

    size = TinyArchitecture(hidden_size=32, layers=1, heads=2, intermediate_size=64)
    command = in_a_pod(volumes, [str(Path(sys.executable).with_name("distrl")), "train", "/shared/config.yaml"])
    make_tiny_model(volumes / "shared/model", character_tokenizer(ALPHABET), seed=0, architecture=size)
    values = {
        "run": {"dir": "/run/distrl", "name": "read-only"},
        "model": {"path": "/shared/model"},
        "data": {"source": "sort_digits", "heldout_size": 8, "options": {"digits": 4}},
        "rollout": {"group_size": 4, "max_new_tokens": 6},
        "generation": {"slots": 16},
        "train": {"steps": 3, "tickets_per_step": 4},
        "evaluation": {"problems": 8, "every_steps": 0},
    }
    (volumes / "shared/config.yaml").write_text(yaml.safe_dump(values))
    for path in (volumes / "shared").rglob("*"):
        os.chown(path, int(POD_SECURITY["runAsUser"]), int(POD_SECURITY["fsGroup"]))
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    run = volumes / "run-distrl" / "read-only"
    assert json.loads((run / "summary.json").read_text())["state"] == "finished"
    assert (run / "summary.json").stat().st_uid == POD_SECURITY["runAsUser"]
    assert not audit_run(run).violations
