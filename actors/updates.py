"""Keeps generation actors at the newest policy version, and the learner to its promise of publishing it."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from actors.pool import Member, Pool
from actors.recorder import Recorder
from distrl.errors import DamagedWeightsError, DeadlineError, DistrlError, LostWeightsError
from distrl.messages import LoadReceipt, PublishAgain
from distrl.staleness import Version
from distrl.tickets import POLICY_WEIGHTS


@dataclass(frozen=True, slots=True)
class UpdateLimits:
    """Bounds of a weight update; see `distrl.config.LimitsConfig`."""

    attempts: int
    retry_delay_s: float
    sync_timeout_s: float
    publish_timeout_s: float


class Updates:
    """Policy versions between their allocation and their arrival at every generation actor.

    Args:
        versions: all of the run, by number; the coordinator adds to them.
        published: the newest that is in the policy store, or that every engine starts from.
        changed: notified whenever something happens that somebody may wait for.
        fail: ends the run with a cause.
        weights: whose versions these are, see `distrl.tickets.weights_of`.
    """

    def __init__(
        self,
        versions: Mapping[int, Version],
        published: Version,
        limits: UpdateLimits,
        recorder: Recorder,
        changed: asyncio.Condition,
        fail: Callable[[BaseException], None],
        weights: str = POLICY_WEIGHTS,
    ) -> None:
        self._versions = versions
        self._limits = limits
        self._recorder = recorder
        self._changed = changed
        self._fail = fail
        self._weights = weights
        self.published = published
        """The newest version that actors are to sample from."""
        self._publication: asyncio.Task[Any] | None = None
        self._refill_wanted: Version | None = None
        self._refills = 0

    # The learner's side -----------------------------------------------------------------------------------------

    def expect(self, version: int) -> int:
        """From here on the learner has `limits.publish_timeout_s` to publish a version; returns it."""
        self._expect_nothing()
        self._publication = asyncio.get_running_loop().create_task(self._is_late(version))
        return version

    def _expect_nothing(self) -> None:
        if self._publication is not None:
            self._publication.cancel()
            self._publication = None

    async def _is_late(self, version: int) -> None:
        timeout_s = self._limits.publish_timeout_s
        await asyncio.sleep(timeout_s)
        self._fail(
            DeadlineError(
                f"the learner must publish policy version {version} within limits.publish_timeout_s = {timeout_s:g} s "
                "of its step, it did not; look at the log of its process"
            )
        )

    def arrived(self, version: Version) -> bool:
        """A version is in the policy store. False where it was there before and was only filled in again."""
        self._expect_nothing()
        if version.version == self.published.version:
            self._refills += 1
            self._recorder.event("published_again", f"policy version {version.version}: the policy store had lost it")
            return False
        self.published = version
        self._refill_wanted = None  # newer weights do as well
        return True

    @property
    def refill_wanted(self) -> bool:
        """Whether the learner is to publish the newest weights again."""
        return self._refill_wanted is not None

    def take_refill(self) -> PublishAgain | None:
        """What the learner is to publish again, once."""
        wanted, self._refill_wanted = self._refill_wanted, None
        return None if wanted is None else PublishAgain(wanted.version, wanted.step)

    # The actors' side -------------------------------------------------------------------------------------------

    async def follow(self, pool: Pool, member: Member, *may_load: asyncio.Event | None) -> None:
        """Keeps one generation actor at the newest version; a pull that fails is made again, with a bound.

        Args:
            may_load: no pull begins while one of these is not set.
        Raises:
            DeadlineError: too many pulls failed in a row; names the actor, the version and the last cause.
        """
        failures = 0
        gates = [gate for gate in may_load if gate is not None]
        while True:
            for gate in gates:
                await gate.wait()
            async with self._changed:
                while self._held(member) == self.published.version:
                    await self._changed.wait()
            if not all(gate.is_set() for gate in gates):
                continue
            target = self.published
            try:
                receipt: LoadReceipt = await member.caller.ask(
                    "pull", target.version, self._weights, timeout_s=self._limits.sync_timeout_s
                )
            except DistrlError as error:
                failures += 1
                await self._failed(member, target, failures, error)
                continue
            failures = 0
            if self._weights == POLICY_WEIGHTS:
                member.version = receipt.version
                member.step = self._versions[receipt.version].step
            else:
                member.others[self._weights] = receipt.version
            self._recorder.load(member.name, receipt, self._weights)
            await pool.changed()

    def _held(self, member: Member) -> int:
        return member.version if self._weights == POLICY_WEIGHTS else member.others.get(self._weights, 0)

    async def _failed(self, member: Member, target: Version, failures: int, error: DistrlError) -> None:
        self._recorder.failed_call(
            "weights", f"{member.name} pulling {self._weights} version {target.version}: {error}"
        )
        if failures >= self._limits.attempts:
            raise DeadlineError(
                f"{member.name} must load {self._weights} version {target.version} in at most "
                f"{self._limits.attempts} attempts; the last error was: {error}"
            ) from error
        lost = isinstance(error, (LostWeightsError, DamagedWeightsError))
        if lost and self._weights == POLICY_WEIGHTS:  # other weights are not the model that the learner trains
            await self._refilled(target)
        else:
            await asyncio.sleep(self._limits.retry_delay_s * 2 ** (failures - 1))

    async def _refilled(self, lost: Version) -> None:
        """Returns when the learner has published lost weights again or newer ones, or its time for that is over."""
        refills = self._refills
        timeout_s = self._limits.publish_timeout_s
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                while self.published == lost and self._refills == refills:
                    if self._refill_wanted is None:
                        self._refill_wanted = lost
                        self._changed.notify_all()
                    await self._changed.wait()
        except TimeoutError:
            # The next attempt fails as this one did, and what it says is missing ends the run in the end.
            self._recorder.failed_call(
                "weights",
                f"the learner must publish policy version {lost.version} again within limits.publish_timeout_s = "
                f"{timeout_s:g} s, it did not",
            )
