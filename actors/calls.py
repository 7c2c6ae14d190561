"""How the coordinator calls a stage: receipts are awaited, references to batches are only passed on.

`LocalCaller` calls a plain object in the same process (tests, simulations); `RayCaller` an actor.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from distrl.errors import DeadlineError, DistrlError, StageError


class WorkerLostError(StageError):
    """The process that a call ran in is gone; the call may be made again elsewhere."""


class DataLostError(StageError):
    """A batch that a call needs was lost with the node that held it; it has to be made again."""


class Caller(Protocol):
    """One worker of a stage."""

    name: str

    async def batch(self, method: str, *args: Any, timeout_s: float) -> tuple[Any, Any]:
        """Call a method that makes a batch: (receipt, reference to the batch).

        Raises:
            DistrlError: the method failed; DeadlineError: no answer in time; WorkerLostError: the worker is gone;
                DataLostError: an argument is.
        """
        ...

    async def ask(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method that returns one value; errors as for `batch`."""
        ...


@dataclass(frozen=True, slots=True)
class LocalRef:
    """Stands for a Ray object reference where there is no Ray."""

    value: Any


class LocalCaller:
    """Calls a plain object; references among the arguments are resolved, as Ray does."""

    def __init__(self, name: str, worker: object) -> None:
        self.name = name
        self._worker = worker

    async def batch(self, method: str, *args: Any, timeout_s: float) -> tuple[Any, Any]:
        receipt, batch = await self.ask(method, *args, timeout_s=timeout_s)
        return receipt, LocalRef(batch)

    async def ask(self, method: str, *args: Any, timeout_s: float) -> Any:
        values = [a.value if isinstance(a, LocalRef) else a for a in args]
        try:
            # Not wait_for: before Python 3.12 it may swallow a cancellation that comes with the result.
            async with asyncio.timeout(timeout_s):
                return await getattr(self._worker, method)(*values)
        except TimeoutError:
            raise _late(self.name, method, timeout_s) from None


class RayCaller:
    """Calls an actor through its handle."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self._handle = handle

    async def batch(self, method: str, *args: Any, timeout_s: float) -> tuple[Any, Any]:
        receipt, batch = getattr(self._handle, method).options(num_returns=2).remote(*args)
        return await self._answer(method, receipt, timeout_s), batch

    async def ask(self, method: str, *args: Any, timeout_s: float) -> Any:
        return await self._answer(method, getattr(self._handle, method).remote(*args), timeout_s)

    async def _answer(self, method: str, ref: "ObjectRef[Any]", timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await ref
        except asyncio.CancelledError:
            ray.cancel(ref)
            raise
        except (TimeoutError, GetTimeoutError):
            ray.cancel(ref)
            raise _late(self.name, method, timeout_s) from None
        except RayTaskError as error:
            raise unwrap(error, f"{self.name}.{method}") from error
        except RayActorError as error:
            raise WorkerLostError(f"{self.name}.{method}: the process is gone: {_first_line(error)}") from error
        except ObjectLostError as error:
            raise DataLostError(f"{self.name}.{method}: {type(error).__name__}: {_first_line(error)}") from error
        except RayError as error:
            raise StageError(f"{self.name}.{method}: {type(error).__name__}: {_first_line(error)}") from error


def unwrap(error: RayTaskError, where: str) -> DistrlError:
    """Our own error out of Ray's; any other cause becomes a StageError that says where and what."""
    cause = error.cause
    if isinstance(cause, DistrlError):
        return cause
    if isinstance(cause, ObjectLostError):
        return DataLostError(f"{where}: {type(cause).__name__}: {_first_line(cause)}")
    return StageError(f"{where}: {type(cause).__name__}: {cause}")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _late(name: str, method: str, timeout_s: float) -> DeadlineError:
    return DeadlineError(f"{name}.{method} must answer within {timeout_s:g} s, got nothing")
