"""The policy store's actor."""

from typing import Any

import ray

from actors.policy_store import PolicyStore
from deploy.remote.located import Located
from distrl.messages import Chunk

KEPT_VERSIONS = 2
"""Published versions in the store: the newest, and the one before it, which an actor may still be pulling."""


class PolicyStoreActor(PolicyStore, Located):
    """`PolicyStore` that puts chunks into Ray's object store and owns them there."""

    def __init__(self) -> None:
        def put(chunk: Chunk) -> Any:
            return ray.put(chunk)

        super().__init__(KEPT_VERSIONS, put)
