"""The machines of the cluster as Ray sees them: which are there, which go soon, and what they have room for."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ray

from deploy.ray_train import RESOURCE

LOOK_S = 1.0
"""Seconds between two looks; Ray's table of nodes is in another process."""


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A node that is alive."""

    node_id: str
    resources: Mapping[str, float]
    drains: bool = False
    """It was announced to go, as before a preemption: Ray starts nothing there any more."""
    goes_s: float | None = None
    """When it goes, in seconds since the epoch; None where nobody said."""
    name: str = ""


class Nodes:
    """Looks at Ray's nodes at most once in `LOOK_S`."""

    def __init__(self) -> None:
        self._seen: tuple[ClusterNode, ...] = ()
        self._looked_s = float("-inf")

    def look(self) -> tuple[ClusterNode, ...]:
        now = time.monotonic()
        if now - self._looked_s >= LOOK_S:
            self._looked_s = now
            # The only way to learn it; Ray Train reads the same table.
            draining = ray._private.state.state.get_draining_nodes()
            self._seen = tuple(
                ClusterNode(
                    node["NodeID"],
                    node["Resources"],
                    node["NodeID"] in draining,
                    draining.get(node["NodeID"], 0) / 1000 or None,
                    node["NodeName"],
                )
                for node in ray.nodes()
                if node["Alive"]
            )
        return self._seen


def learner_room(nodes: Iterable[ClusterNode], device: str) -> int:
    """Learner workers that nodes have room for which stay.

    Args:
        device: `train.device`; with `cuda` each takes a GPU.
    """
    return sum(_room(node.resources, device) for node in nodes if not node.drains)


def _room(resources: Mapping[str, float], device: str) -> int:
    room = resources.get(RESOURCE, 0.0)
    return int(min(room, resources.get("GPU", 0.0)) if device == "cuda" else room)
