"""Generation and learner take turns on one device: while one works, the other has given its memory back."""

import asyncio
from collections.abc import Sequence

from actors.pool import Pool
from distrl.errors import DistrlError


class Turns:
    """Only for synchronous training: there the learner and the actors never work at the same time anyway.

    Args:
        pools: generation actors on the device.
        timeout_s: seconds that an actor may take to give its memory back, or to take it again.
    """

    def __init__(self, pools: Sequence[Pool], timeout_s: float) -> None:
        self._pools = pools
        self._timeout_s = timeout_s
        self._asleep = False
        self._changing = asyncio.Lock()
        self.awake = asyncio.Event()
        """Set while the actors have their memory: new weights are loaded only then."""
        self.awake.set()

    async def to_learner(self) -> None:
        """Returns when no actor samples and all have given their memory back.

        Raises:
            DeadlineError, StageError: an actor did not; names it.
        """
        async with self._changing:
            if self._asleep:
                return
            for pool in self._pools:
                await pool.close()
            self.awake.clear()
            await self._all("sleep")
            self._asleep = True

    async def to_generation(self) -> None:
        """Returns when every actor has its memory again and may sample; its weights are those that it pulls next.

        Raises:
            DeadlineError, StageError: an actor has not; names it.
        """
        async with self._changing:
            if not self._asleep:
                return
            await self._all("wake")
            self._asleep = False
            self.awake.set()
            for pool in self._pools:
                await pool.open()

    async def _all(self, method: str) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for pool in self._pools:
                    for member in pool.members:
                        group.create_task(member.caller.ask(method, timeout_s=self._timeout_s))
        except* DistrlError as errors:
            raise errors.exceptions[0] from None
