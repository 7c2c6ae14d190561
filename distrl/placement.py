"""Which processes of a run want GPUs, and whether some nodes can ever give them. Numbers only: no Ray, no device.

A process is a *claim*: whole GPUs that must lie on one node (tensor parallel), or a share of one. Claims are packed
into nodes largest first. That finds a packing whenever there is one, as long as all claims of more than one GPU have
the same size; those of a run have.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distrl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Claim:
    """What one process wants."""

    name: str
    gpus: float
    """A whole number of GPUs on one node, or a share below 1 of a single one."""


@dataclass(frozen=True, slots=True)
class Node:
    """What one machine of the cluster has."""

    name: str
    gpus: float


def check_shares(claims: Iterable[Claim]) -> None:
    """Refuse shares of one GPU that add up to more than it.

    Raises:
        ConfigError: names every share and the shortfall.
    """
    claims = list(claims)
    total = sum(claim.gpus for claim in claims)
    if total > 1 + 1e-9:
        raise ConfigError(
            f"placement: the shares of the one GPU must add up to at most 1, got {total:g} "
            f"({_list(claims)}), {total - 1:g} too much; lower a share or the number of actors"
        )


def check_fits(claims: Iterable[Claim], nodes: Sequence[Node]) -> None:
    """Refuse a placement that these nodes can never give.

    Raises:
        ConfigError: names the process that does not fit, what is wanted and there, and the shortfall.
    """
    claims = [claim for claim in claims if claim.gpus]
    if not claims:
        return
    wanted, there = sum(c.gpus for c in claims), sum(n.gpus for n in nodes)
    if wanted > there + 1e-9:
        raise ConfigError(
            f"placement: the run needs {wanted:g} GPUs ({_list(claims)}), the cluster has {there:g}, "
            f"{wanted - there:g} too few; lower the number of actors, share a GPU with placement.mode=shared or turns, "
            "or add nodes"
        )
    largest = max(claims, key=lambda c: c.gpus)
    if nodes and largest.gpus > (most := max(n.gpus for n in nodes)):
        raise ConfigError(
            f"placement: {largest.name} needs {largest.gpus:g} GPUs on one node, the largest node has {most:g}, "
            f"{largest.gpus - most:g} too few; lower generation.tensor_parallel_size"
        )
    free = {node.name: node.gpus for node in nodes}
    for claim in sorted(claims, key=lambda c: -c.gpus):
        node = next((name for name, gpus in free.items() if gpus + 1e-9 >= claim.gpus), None)
        if node is None:
            left = ", ".join(f"{name} {gpus:g}" for name, gpus in free.items())
            raise ConfigError(
                f"placement: {claim.name} needs {claim.gpus:g} GPUs on one node; with the other processes placed, the "
                f"nodes have left: {left}; lower generation.tensor_parallel_size or add a node"
            )
        free[node] -= claim.gpus


def _list(claims: Iterable[Claim]) -> str:
    """Claims of the same kind together: `generation 4 x 2, learner 1`."""
    kinds: dict[tuple[str, float], int] = {}
    for claim in claims:
        kind = claim.name.rpartition("-")[0] or claim.name
        kinds[kind, claim.gpus] = kinds.get((kind, claim.gpus), 0) + 1
    return ", ".join(f"{kind} {n} x {gpus:g}" if n > 1 else f"{kind} {gpus:g}" for (kind, gpus), n in kinds.items())
