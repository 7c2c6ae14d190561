"""The workers of a group, as the training loop sees them: who it is, and what it asks of the others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from distrl.errors import RunError

T = TypeVar("T")

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class World:
    """One worker of `size`; its collectives are those of `torch.distributed`, none for a single one."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    control: Any = None
    """Group for small messages, on the CPU whatever the device; None is the default group."""
    files: Any = None
    """Group for checkpoints, whose messages may cross those of the training loop; None is the default group."""

    @classmethod
    def join(cls, rank: int, size: int, device: torch.device) -> "World":
        """Makes the groups; every worker calls it, after `init_process_group`."""
        if size == 1:
            return cls(rank, size, device)
        # A worker waits in a message for the first one, which waits for a batch. How long that takes is bounded by the
        # run; that a worker dies shows at once.
        control, files = (distributed.new_group(backend="gloo", timeout=timedelta(days=1)) for _ in range(2))
        return cls(rank, size, device, control, files)

    @property
    def first(self) -> bool:
        """Whether this is the worker that speaks to the rest of the run."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first worker makes, on every worker; what it raises, it raises everywhere.

        Raises:
            RunError: on the other workers, where the first one failed.
        """
        if self.size == 1:
            return make()
        if not self.first:
            received: list[Any] = [None]
            distributed.broadcast_object_list(received, src=0, group=self.control)
            value, failure = received[0]
            if failure is not None:
                raise RunError(f"the first learner worker failed: {failure}")
            made: T = value
            return made
        try:
            value = make()
        except BaseException as error:
            # The others wait for an answer and must not wait for ever.
            distributed.broadcast_object_list([(None, f"{type(error).__name__}: {error}")], src=0, group=self.control)
            raise
        distributed.broadcast_object_list([(value, None)], src=0, group=self.control)
        return value

    def gather(self, value: T) -> Sequence[T]:
        """One value of each worker, in the order of their ranks, on all of them."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=self.control)
        return found

    def gather_files(self, value: T) -> Sequence[T]:
        """As `gather`, from the thread that writes checkpoints."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=self.files)
        return found

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds up a CPU tensor over all workers, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor, group=self.control)
        return tensor


def another_is_gone(error: BaseException) -> bool:
    """Whether a collective failed because the connection to another worker is gone, as after its death.

    torch.distributed has no type for it with gloo, which says it in words.
    """
    failures: Mapping[int, Any] = getattr(error, "failures", {})  # of a CheckpointException, by rank
    causes = [error, *(failure[0] for failure in failures.values())]
    return any(
        isinstance(cause, distributed.DistError) or (isinstance(cause, RuntimeError) and "gloo" in str(cause))
        for cause in causes
    )
