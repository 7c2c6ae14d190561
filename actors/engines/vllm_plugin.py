"""vLLM's plug-in: makes our way of taking new weights known in each of vLLM's processes.

vLLM finds `register` through the entry point in the group `vllm.general_plugins` of pyproject.toml.
"""

import os
import threading
import time

BACKEND = "distrl_shared_memory"
"""Name of the weight-transfer backend."""

OWNER = "DISTRL_VLLM_OWNER"
"""Environment variable with the process id of the generation actor, set for its vLLM alone."""

POLL_S = 1.0


def register() -> None:
    """Called by vLLM in every process, perhaps more than once."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "actors.engines.vllm_worker", "SharedMemoryTransfer")
        if os.environ.get(OWNER) == str(os.getppid()):
            threading.Thread(target=_end_with_owner, name="distrl-owner", daemon=True).start()


def _end_with_owner() -> None:
    """A killed generation actor cannot end its vLLM, which would hold its memory for ever.

    vLLM's workers end with its engine process by themselves.
    """
    owner = os.getppid()
    while os.getppid() == owner:
        time.sleep(POLL_S)
    os._exit(1)
