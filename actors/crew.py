"""The processes of the stages, as they come and go; the supervisor starts and ends them."""

from typing import Any

from actors.calls import Caller
from actors.pipeline import Pipeline
from actors.pool import Member, Pool
from distrl.errors import RunError


class Crew:
    """Who belongs to which pool."""

    def __init__(self, pipeline: Pipeline) -> None:
        pools = [pipeline.generation, *pipeline.own_pools.values(), pipeline.grading]
        if pipeline.reference is not None:
            pools.append(pipeline.reference)
        self._pools = {pool.stage: pool for pool in pools}

    def find(self, name: str) -> tuple[Pool, Member] | None:
        for pool in self._pools.values():
            if (member := pool.find(name)) is not None:
                return pool, member
        return None

    def add(self, stage: str, caller: Caller, capacity: int) -> Member | None:
        """The new member; None where one of this name is there or was lost: a process joins once.

        Raises:
            RunError: the run has no such stage.
        """
        if stage not in self._pools:
            raise RunError(f"{caller.name} must join one of the stages {', '.join(self._pools)}, got {stage}")
        pool = self._pools[stage]
        if pool.find(caller.name) is not None or caller.name in pool.lost:
            return None
        return pool.add(caller, capacity)

    async def remove(self, name: str) -> bool:
        """Forgets a process, whether it was lost or not; what it has under way ends as it ends.

        Returns:
            Whether it was known.
        """
        known = False
        for pool in self._pools.values():
            known |= pool.forget(name)
            if (member := pool.find(name)) is not None:
                await pool.remove(member)
                known = True
        return known

    async def changed(self) -> None:
        """Wakes everybody who waits for a place."""
        for pool in self._pools.values():
            await pool.changed()

    def drain(self, name: str) -> None:
        """A process gets nothing new; it may be ended as soon as it is not busy."""
        if (found := self.find(name)) is not None:
            found[1].draining = True

    def report(self) -> dict[str, Any]:
        """Members by name with stage, places taken and whether they drain; lost ones with the cause."""
        return {
            "members": [member.report(stage) for stage, pool in self._pools.items() for member in pool.members],
            "crew": {
                member.name: {"stage": stage, "busy": member.busy, "draining": member.draining}
                for stage, pool in self._pools.items()
                for member in pool.members
            },
            "lost": {name: cause for pool in self._pools.values() for name, cause in pool.lost.items()},
            "busy": {stage: pool.busy for stage, pool in self._pools.items()},
        }
