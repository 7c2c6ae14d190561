"""The policy store: owns the published weights, so that they outlive the learner that made them."""

from collections.abc import Callable
from typing import Any

import ray

from distrl.errors import PolicyError
from distrl.messages import Chunk, Manifest


class PolicyStore:
    """Keeps the newest versions; chunks arrive by value and are put into the object store by this process.

    Args:
        keep: how many published versions are kept; an actor that pulls an older one is told the newest.
        put: makes the reference that readers fetch; `ray.put` in an actor. What the store puts, the store owns.
    """

    def __init__(self, keep: int, put: Callable[[Chunk], Any]) -> None:
        self._keep = keep
        self._put = put
        self._arriving: dict[int, dict[int, Any]] = {}
        self._published: dict[int, tuple[Manifest, list[Any]]] = {}

    @ray.method
    async def add_chunk(self, version: int, index: int, chunk: Chunk) -> None:
        """Takes one chunk of a version that is being published; sending it again replaces it."""
        self._arriving.setdefault(version, {})[index] = self._put(chunk)

    @ray.method
    async def publish(self, manifest: Manifest) -> None:
        """Makes a version available, once all its chunks are here.

        Raises:
            PolicyError: a chunk is missing; nothing is published.
        """
        arrived = self._arriving.get(manifest.version, {})
        wanted = {entry.chunk for entry in manifest.tensors}
        if missing := sorted(wanted - set(arrived)):
            raise PolicyError(
                f"policy version {manifest.version} cannot be published: all {len(wanted)} chunks must have arrived, "
                f"missing {missing}; send them again"
            )
        del self._arriving[manifest.version]
        self._published[manifest.version] = (manifest, [arrived[i] for i in sorted(arrived)])
        for old in sorted(self._published)[: -self._keep]:
            del self._published[old]
        for old in [v for v in self._arriving if v < manifest.version]:
            del self._arriving[old]  # left behind by a learner that died while it was publishing

    @ray.method
    async def fetch(self, version: int) -> tuple[Manifest, list[Any]]:
        """A published version: its manifest and the references to its chunks.

        Raises:
            PolicyError: the version is not here (any more).
        """
        if version not in self._published:
            raise PolicyError(
                f"policy version {version} must be in the store, which has {sorted(self._published) or 'none'}; "
                "pull the newest"
            )
        return self._published[version]
