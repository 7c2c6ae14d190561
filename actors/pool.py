"""The workers of one stage: who is there, how busy, and with which policy version."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.calls import Caller


@dataclass(slots=True)
class Member:
    """One worker; `busy` of its `capacity` places are taken.

    A place is one call, or in generation one response that is sampled.
    """

    caller: Caller
    capacity: int
    busy: int = 0
    version: int = 0
    """Policy version that it samples from (generation only)."""
    step: int = 0
    """Optimizer step of that version."""
    others: dict[str, int] = field(default_factory=dict)
    """Versions of the other weights that it holds, by name (generation only)."""

    @property
    def name(self) -> str:
        return self.caller.name

    def report(self, stage: str) -> dict[str, object]:
        """What the driver learns of it."""
        return {
            "stage": stage,
            "name": self.name,
            "capacity": self.capacity,
            "busy": self.busy,
            "version": self.version,
            "step": self.step,
        }


def anybody(member: Member) -> bool:
    return True


class Pool:
    """Gives calls to the least busy member that fits; waits while there is none."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.members: list[Member] = []
        self.busy = 0
        """Places taken at all members together."""
        self._closed = False
        self._changed = asyncio.Condition()
        self._listeners: list[Callable[[], None]] = []

    def add(self, caller: Caller, capacity: int) -> Member:
        member = Member(caller, capacity)
        self.members.append(member)
        return member

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever a place becomes free or a member's version changes."""
        self._listeners.append(listener)

    def take(self, places: int = 1, fits: Callable[[Member], bool] = anybody) -> Member | None:
        """Takes places at the least busy member that fits and has them free, or None."""
        if self._closed:
            return None
        free = [m for m in self.members if m.busy + places <= m.capacity and fits(m)]
        if not free:
            return None
        member = min(free, key=lambda m: m.busy / m.capacity)
        member.busy += places
        self.busy += places
        return member

    async def wait_take(self, places: int = 1, fits: Callable[[Member], bool] = anybody) -> Member:
        """Takes places as soon as a member that fits has them free."""
        async with self._changed:
            while (member := self.take(places, fits)) is None:
                await self._changed.wait()
            return member

    async def close(self) -> None:
        """Gives no more places, and returns when all are free."""
        self._closed = True
        async with self._changed:
            while self.busy:
                await self._changed.wait()

    async def open(self) -> None:
        """Gives places again."""
        self._closed = False
        await self.changed()

    async def wait_all(self, fits: Callable[[Member], bool]) -> None:
        """Returns when every member fits."""
        async with self._changed:
            while not all(fits(m) for m in self.members):
                await self._changed.wait()

    async def give_back(self, member: Member, places: int = 1) -> None:
        member.busy -= places
        self.busy -= places
        await self.changed()

    async def changed(self) -> None:
        """Wake everybody who waits for a place or a version."""
        async with self._changed:
            self._changed.notify_all()
        for listener in self._listeners:
            listener()
