"""The driver's calls to the coordinator, which may be away while Ray starts it again."""

from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayTaskError

from actors.calls import unwrap
from distrl.errors import RunError

ANSWER_S = 1.0
"""Seconds that a look at the run may be held up by a coordinator that is busy or away."""


class CoordinatorLine:
    """Tells without waiting and asks without hanging.

    Args:
        coordinator: its handle, the same before and after a restart.
    """

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._told: list[tuple[str, Any]] = []
        self._asked: Any = None

    def tell(self, method: str, *arguments: Any) -> None:
        """Calls a method; its failure is raised by the next `check`. What a dying coordinator had not heard is lost."""
        self._told.append((method, getattr(self._coordinator, method).remote(*arguments)))

    def check(self) -> None:
        """Raises what a call that was told has failed with."""
        pending = []
        for method, told in self._told:
            try:
                ray.get(told, timeout=0)
            except GetTimeoutError:
                pending.append((method, told))
            except RayTaskError as error:
                raise unwrap(error, f"coordinator.{method}") from error
            except RayActorError:
                pass  # it is away; who told it compares what it knows with what there is when it is back
        self._told = pending

    def snapshot(self, after: int) -> dict[str, Any] | None:
        """What the coordinator says of the run, with the records after a number; None while it is away.

        Raises:
            RunError: it has ended for good.
        """
        if self._asked is None:
            self._asked = self._coordinator.snapshot.remote(after)
        try:
            found: dict[str, Any] = ray.get(self._asked, timeout=ANSWER_S)
        except GetTimeoutError:
            return None  # asked already
        except ActorDiedError as error:
            raise RunError(f"the coordinator has ended: {error}") from error
        except RayActorError:
            self._asked = None
            return None
        except RayTaskError as error:
            raise unwrap(error, "coordinator.snapshot") from error
        self._asked = None
        return found
