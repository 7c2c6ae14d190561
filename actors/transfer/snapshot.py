"""The newest published weights in files in memory, where senders read them while the learner trains on."""

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.engines.shared_weights import map_weights, write_weights
from distrl.errors import LostWeightsError


def memory_file(name: str) -> tuple[int, str]:
    """An empty file that has no name, and the path by which other processes of this user open it.

    It goes with the last process that has it open or mapped, whatever that one died of.
    """
    descriptor = os.memfd_create(name)
    return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"


class Snapshots:
    """Keeps the newest version of each of the weights; the learner's side. A file that is replaced stays readable for
    who has mapped it."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="distrl-transfer-"))
        """Says where each version lies."""
        self._open: dict[str, int] = {}

    def put(self, weights: str, version: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies a version and forgets the one before; the copies, which do not change any more."""
        descriptor, path = memory_file("distrl-published")
        placed = [asdict(entry) for entry in write_weights(Path(path), tensors)]
        copies = map_weights(path, placed)
        before, self._open[weights] = self._open.get(weights), descriptor
        index = self.directory / weights
        aside = index.with_suffix(".partial")
        aside.write_text(json.dumps({"version": version, "path": path, "placed": placed}))
        aside.rename(index)
        if before is not None:
            os.close(before)
        return copies

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}
        shutil.rmtree(self.directory, ignore_errors=True)


def opened(directory: Path, weights: str, version: int, names: Collection[str]) -> dict[str, Tensor]:
    """Some tensors of a version, as views into its file.

    Should the file be replaced at this moment, they are another version's; the hashes of the one that was asked for say
    so to the receiver.

    Raises:
        LostWeightsError: it is not there (any more), or has no such tensor.
    """
    index = directory / weights
    there: dict[str, Any] = json.loads(index.read_text()) if index.exists() else {"version": "none"}
    if there["version"] != version:
        raise LostWeightsError(
            f"{weights} version {version} must be the one that the learner keeps to be sent, which is "
            f"{there['version']}; take it from the policy store"
        )
    found = map_weights(there["path"], [entry for entry in there["placed"] if entry["name"] in names])
    if lacking := sorted(set(names) - found.keys()):
        raise LostWeightsError(f"{weights} version {version} has no tensor {lacking[0]}; take it from the policy store")
    return found
