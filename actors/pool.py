"""The workers of one stage: who is there, how busy, and with which policy version."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from actors.calls import Caller


@dataclass(slots=True, eq=False)
class Member:
    """One worker process; `busy` of its `capacity` places are taken.

    A place is one call, or in generation one response that is sampled. A process that is started in place of a dead
    one is another member: nothing that was known of the dead one holds for it.
    """

    caller: Caller
    capacity: int
    busy: int = 0
    version: int = 0
    """Policy version that it samples from (generation only)."""
    step: int = 0
    """Optimizer step of that version."""
    behind: bool = False
    """It must load the newest weights before it samples (generation only)."""
    draining: bool = False
    """It finishes what it has and gets nothing new."""
    suspects: int = 0
    """Tickets under way here that may be what kills workers; never more than one."""
    failed_tickets: set[int] = field(default_factory=set)
    """Tickets that failed here since the last call that succeeded here."""
    successes_elsewhere: int = 0
    """What the pool had done when the first of them failed."""
    loading: tuple[int, float] | None = None
    """The version that it is being given, and since when (generation only)."""
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
            "loading": self.loading,
        }


def anybody(member: Member) -> bool:
    return True


def unsuspected(member: Member) -> bool:
    """Members without a ticket that may be what kills workers; see `Pipeline`."""
    return member.suspects == 0


class Pool:
    """Gives calls to the least busy member that fits; waits while there is none. Members come and go at any time."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.members: list[Member] = []
        self.lost: dict[str, str] = {}
        """Members that were taken out because they died or failed too often, with the cause; see `forget`."""
        self._successes = 0
        self.busy = 0
        """Places taken at all members together."""
        self._closed = False
        self._changed = asyncio.Condition()
        self._listeners: list[Callable[[], None]] = []

    def add(self, caller: Caller, capacity: int) -> Member:
        member = Member(caller, capacity)
        self.members.append(member)
        return member

    def find(self, name: str) -> Member | None:
        return next((m for m in self.members if m.name == name), None)

    async def remove(self, member: Member) -> None:
        """Takes a member out; calls that it has under way end as they end."""
        if member in self.members:
            self.members.remove(member)
            self.busy -= member.busy  # what it still has is nobody's business here any more
        await self.changed()

    async def lose(self, member: Member, cause: str) -> None:
        """Takes out a member that is dead or not to be trusted; whoever supervises the processes replaces it."""
        if member in self.members:
            self.lost[member.name] = cause
            await self.remove(member)

    def forget(self, name: str) -> bool:
        """The supervisor knows of the loss; whether there was one."""
        return self.lost.pop(name, None) is not None

    def succeeded(self, member: Member) -> None:
        """A call succeeded there."""
        self._successes += 1
        member.failed_tickets.clear()

    def failed(self, member: Member, tickets: Iterable[int], limit: int) -> bool:
        """A call with these tickets failed there; whether the member, and not the tickets, is to blame.

        It is when `limit` different tickets in a row failed there while calls succeeded elsewhere in the pool.
        """
        if not member.failed_tickets:
            member.successes_elsewhere = self._successes
        member.failed_tickets.update(tickets)
        return len(member.failed_tickets) >= limit and self._successes > member.successes_elsewhere

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever a place becomes free or a member's version changes."""
        self._listeners.append(listener)

    def take(self, places: int = 1, fits: Callable[[Member], bool] = anybody) -> Member | None:
        """Takes places at the least busy member that fits and has them free, or None."""
        if self._closed:
            return None
        free = [m for m in self.members if m.busy + places <= m.capacity and not (m.behind or m.draining) and fits(m)]
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
        """Returns when there are members and every one of them fits."""
        async with self._changed:
            while not self.members or not all(fits(m) for m in self.members):
                await self._changed.wait()

    async def give_back(self, member: Member, places: int = 1) -> None:
        member.busy -= places
        if member in self.members:
            self.busy -= places
        await self.changed()

    async def changed(self) -> None:
        """Wake everybody who waits for a place or a version."""
        async with self._changed:
            self._changed.notify_all()
        for listener in self._listeners:
            listener()
