"""Keeps generation actors at the newest policy version, and the learner to its promise of publishing it."""

import asyncio
from dataclasses import dataclass
from typing import Any

from actors.calls import WorkerLostError
from actors.outcome import Outcome
from actors.pipeline import Pipeline
from actors.policy_versions import PolicyVersions
from actors.pool import Member
from actors.recorder import Recorder
from distrl.errors import DamagedWeightsError, DeadlineError, DistrlError, LostWeightsError
from distrl.messages import LoadReceipt, PublishAgain
from distrl.staleness import Version


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
        versions: all of the run; the coordinator says which one is published.
        outcome: notified whenever something happens that somebody may wait for; told what ends the run.
    """

    def __init__(
        self,
        versions: PolicyVersions,
        pipeline: Pipeline,
        limits: UpdateLimits,
        recorder: Recorder,
        outcome: Outcome,
    ) -> None:
        self._versions = versions
        self._pipeline = pipeline
        self._pool = pipeline.generation
        self._limits = limits
        self._recorder = recorder
        self._changed = outcome.changed
        self._outcome = outcome
        self.paused = False
        """While the learner is not heard of, after a restart of the coordinator or of itself: nobody loads anything."""
        self.may_load = asyncio.Event()
        """Set once weights may change under the actors."""
        self._publication: asyncio.Task[Any] | None = None
        self._refill_wanted: Version | None = None
        self._refills = 0

    # The learner's side -----------------------------------------------------------------------------------------

    def expect(self, version: int) -> int:
        """From here on the learner has `limits.publish_timeout_s` to publish a version; returns it."""
        self.expect_nothing()
        self._publication = asyncio.get_running_loop().create_task(self._is_late(version))
        return version

    def expect_nothing(self) -> None:
        """The learner that was to publish something is gone, or has published it."""
        if self._publication is not None:
            self._publication.cancel()
            self._publication = None

    async def _is_late(self, version: int) -> None:
        timeout_s = self._limits.publish_timeout_s
        await asyncio.sleep(timeout_s)
        self._outcome.fail(
            DeadlineError(
                f"the learner must publish policy version {version} within limits.publish_timeout_s = {timeout_s:g} s "
                "of its step, it did not; look at the log of its process"
            )
        )

    def arrived(self, version: int) -> bool:
        """A version is in the policy store. False where it was there before and was only filled in again."""
        self.expect_nothing()
        if version == self._versions.published.version:
            self._refills += 1
            self._recorder.event("published_again", f"policy version {version}: the policy store had lost it")
            return False
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

    async def follow(self, member: Member) -> None:
        """Keeps one generation actor at the newest version; a pull that fails is made again, with a bound.

        Raises:
            DeadlineError: too many pulls failed in a row; names the actor, the version and the last cause.
        """
        failures = 0
        await self.may_load.wait()
        while True:
            async with self._changed:
                while member in self._pool.members and (self.paused or self.is_up_to_date(member)):
                    await self._changed.wait()
            if member not in self._pool.members:
                return
            target = self._versions.published
            try:
                receipt: LoadReceipt = await member.caller.ask(
                    "pull", target.version, timeout_s=self._limits.sync_timeout_s
                )
            except WorkerLostError as error:
                await self._pipeline.lose(self._pool, member, str(error))
                return
            except DistrlError as error:
                failures += 1
                await self._failed(member, target, failures, error)
                continue
            failures = 0
            self.set_version(member, receipt.version)
            member.behind = False
            self._recorder.load(member.name, receipt)
            await self._pool.changed()

    async def enter(self, member: Member) -> None:
        """A generation actor is new in the pool: it loads the newest weights before it samples."""
        member.behind = True
        try:
            version = await member.caller.ask("policy_version", timeout_s=self._limits.sync_timeout_s)
        except DistrlError as error:
            await self._pipeline.lose(self._pool, member, str(error))
            return
        self.set_version(member, version)
        # Before the first evaluation is over nobody loads anything, and all sample from what they began with.
        member.behind = self.may_load.is_set() and not self.is_up_to_date(member)

    def begin_to_load(self) -> None:
        """From here on weights change under the actors; nobody samples who has not loaded the newest."""
        self.paused = False
        self.may_load.set()
        for member in self._pool.members:
            member.behind = not self.is_up_to_date(member)

    def pause(self) -> None:
        """The learner was rolled back: what actors have counts by its distance from the version that is now the
        published one, and nobody loads anything until that is in the store again."""
        self.paused = True
        for member in self._pool.members:
            self.set_version(member, member.version)

    def is_up_to_date(self, member: Member) -> bool:
        return member.version == self._versions.published.version

    def set_version(self, member: Member, version: int) -> None:
        member.version, member.step = version, self._versions.step_of(version)

    async def _failed(self, member: Member, target: Version, failures: int, error: DistrlError) -> None:
        self._recorder.event("failed_call", f"{member.name} pulling version {target.version}: {error}")
        if failures >= self._limits.attempts:
            raise DeadlineError(
                f"{member.name} must load policy version {target.version} in at most "
                f"{self._limits.attempts} attempts; the last error was: {error}"
            ) from error
        if isinstance(error, (LostWeightsError, DamagedWeightsError)):
            await self._refilled(target)
        else:
            await asyncio.sleep(self._limits.retry_delay_s * 2 ** (failures - 1))

    async def _refilled(self, lost: Version) -> None:
        """Returns when the learner has published lost weights again or newer ones, or its time for that is over."""
        refills = self._refills
        timeout_s = self._limits.publish_timeout_s
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                while self._versions.published == lost and self._refills == refills:
                    if self._refill_wanted is None:
                        self._refill_wanted = lost
                        self._changed.notify_all()
                    await self._changed.wait()
        except TimeoutError:
            # The next attempt fails as this one did, and what it says is missing ends the run in the end.
            self._recorder.event(
                "failed_call",
                f"the learner must publish policy version {lost.version} again within limits.publish_timeout_s = "
                f"{timeout_s:g} s, it did not",
            )
