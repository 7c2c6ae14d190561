"""Whether every machine of a cluster sees the folder that a run keeps its files in."""

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.run_dir import RunDir
from deploy.run_storage import storage_at
from distrl.config import Config
from distrl.errors import RefusedError

ANSWER_S = 20.0
"""Seconds that a machine gets to answer."""


def check_seen_everywhere(config: Config, run_dir: RunDir) -> None:
    """
    Raises:
        RefusedError: the storage is a folder of one machine, and the cluster has several.
    """
    folder = storage_at(config.storage.uri, run_dir).folder
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if folder.local is not None and len(nodes) > 1:
        folder.make()
        setting = "run.dir, where storage.uri is empty," if config.storage.uri is None else "storage.uri"
        check_seen(folder.local, setting, nodes, _ask)


def check_seen(
    folder: Path,
    setting: str,
    nodes: Sequence[dict[str, Any]],
    sees: Callable[[dict[str, Any], Path], bool | None],
) -> None:
    """Puts a file into the folder and asks every node for it.

    Args:
        sees: whether a node has the file; None where it does not answer. A machine that has just died or is cut off
            counts as alive for a while, and must not keep a run from being resumed without it.
    Raises:
        RefusedError: names the first node that has not.
    """
    mark = folder / f".seen-{uuid.uuid4().hex}"
    mark.touch()
    try:
        for node in nodes:
            if sees(node, mark) is False:
                raise RefusedError(
                    f"{setting} must be seen by every machine of the cluster, {node['NodeManagerAddress']} does not "
                    f"see {folder}; set storage.uri to object storage, such as s3://bucket/runs, or to a volume that "
                    "all of them share"
                )
    finally:
        mark.unlink()


def _ask(node: dict[str, Any], mark: Path) -> bool | None:
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    asked: Any = ray.remote(_is_file).options(num_cpus=0, scheduling_strategy=strategy)
    try:
        return bool(ray.get(asked.remote(mark), timeout=ANSWER_S))
    except ray.exceptions.RayError:
        return None


def _is_file(path: Path) -> bool:
    return path.is_file()
