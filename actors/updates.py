"""Keeps generation actors at the newest policy version, and the learner to its promise of publishing it."""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from actors.calls import WorkerLostError
from actors.outcome import Outcome
from actors.pipeline import Pipeline
from actors.pool import Member, Pool
from actors.recorder import Recorder
from distrl.errors import DamagedWeightsError, DeadlineError, DistrlError, LostWeightsError
from distrl.messages import LoadReceipt, PublishAgain
from distrl.staleness import Version
from distrl.tickets import POLICY_WEIGHTS


@dataclass(frozen=True, slots=True)
class UpdateLimits:
    """Bounds of a weight update; see `distrl.config_sections.LimitsConfig`."""

    attempts: int
    retry_delay_s: float
    sync_timeout_s: float
    publish_timeout_s: float


class Published(Protocol):
    """Says which version is in use; see `actors.policy_versions`."""

    @property
    def published(self) -> Version: ...

    def step_of(self, *sampled_by: int) -> int: ...


@dataclass(slots=True)
class Unversioned:
    """Weights that count for no staleness: which of their publications is the newest."""

    published: Version

    def step_of(self, *sampled_by: int) -> int:
        return self.published.step


class Updates:
    """Policy versions between their allocation and their arrival at every generation actor.

    Args:
        versions: says which one is published.
        weights: whose versions these are, see `distrl.tickets.weights_of`.
        outcome: notified whenever something happens that somebody may wait for; told what ends the run.
    """

    def __init__(
        self,
        versions: Published,
        pipeline: Pipeline,
        limits: UpdateLimits,
        recorder: Recorder,
        outcome: Outcome,
        weights: str = POLICY_WEIGHTS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._versions = versions
        self._clock = clock
        self._pipeline = pipeline
        self._weights = weights
        self._limits = limits
        self._recorder = recorder
        self._changed = outcome.changed
        self._outcome = outcome
        self.paused = False
        """While the learner is not heard of, after a restart of the coordinator or of itself: nobody loads anything."""
        self._publication: asyncio.Task[Any] | None = None
        self._publishing: tuple[int, float] | None = None  # version, and since when
        self._refill_wanted: Version | None = None
        self._refills = 0

    # The learner's side -----------------------------------------------------------------------------------------

    def expect(self, version: int) -> int:
        """From here on the learner has `limits.publish_timeout_s` to publish a version; returns it."""
        self.expect_nothing()
        self._publication = asyncio.get_running_loop().create_task(self._is_late(version))
        self._publishing = (version, self._clock())
        return version

    def expect_nothing(self) -> None:
        """The learner that was to publish something is gone, or has published it."""
        if self._publication is not None:
            self._publication.cancel()
            self._publication = None
        self._publishing = None

    def report(self) -> dict[str, Any] | None:
        """The version that the learner is publishing; None where it is not."""
        if self._publishing is None:
            return None
        version, since = self._publishing
        return {"version": version, "since_s": self._clock() - since}

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

    async def follow(self, pool: Pool, member: Member, *may_load: asyncio.Event | None) -> None:
        """Keeps one generation actor at the newest version; a pull that fails is made again, with a bound.

        Returns when the actor has left the pool.

        Args:
            may_load: no pull begins while one of these is not set. The first does not hold up an actor that may not
                sample before it has loaded.
        Raises:
            DeadlineError: too many pulls failed in a row; names the actor, the version and the last cause.
        """
        failures = 0
        gates = [gate for gate in may_load if gate is not None]
        while True:
            for gate in gates[member.behind :]:
                await gate.wait()
            async with self._changed:
                while member in pool.members and (self.paused or self.is_up_to_date(member)):
                    await self._changed.wait()
            if member not in pool.members:
                return
            if not all(gate.is_set() for gate in gates[member.behind :]):
                continue
            target = self._versions.published
            member.loading = (target.version, self._clock())
            try:
                receipt: LoadReceipt = await member.caller.ask(
                    "pull", target.version, self._weights, timeout_s=self._limits.sync_timeout_s
                )
            except WorkerLostError as error:
                await self._pipeline.lose(pool, member, str(error))
                return
            except DistrlError as error:
                failures += 1
                await self._failed(member, target, failures, error)
                continue
            failures = 0
            member.loading = None
            self._set_version(member, receipt.version)
            self._recorder.load(member.name, receipt, self._weights)
            await pool.changed()

    async def enter(self, pool: Pool, member: Member, may_load: asyncio.Event) -> None:
        """A generation actor is new in the pool: it loads the newest weights before it samples."""
        member.behind = True
        try:
            version = await member.caller.ask("policy_version", self._weights, timeout_s=self._limits.sync_timeout_s)
        except DistrlError as error:
            await self._pipeline.lose(pool, member, str(error))
            return
        self._set_version(member, version)
        # Before the first evaluation is over nobody loads anything.
        member.behind = may_load.is_set() and not self.is_up_to_date(member)

    def begin_to_load(self, pools: Iterable[Pool]) -> None:
        """From here on weights change under the actors; nobody samples who has not loaded the newest."""
        self.paused = False
        for pool in pools:
            for member in pool.members:
                member.behind = not self.is_up_to_date(member)

    def pause(self, pools: Iterable[Pool]) -> None:
        """The learner was rolled back: what actors have counts by its distance from the version that is now the
        published one, and nobody loads anything until that is in the store again."""
        self.paused = True
        for pool in pools:
            for member in pool.members:
                member.step = self._versions.step_of(member.version)

    def is_up_to_date(self, member: Member) -> bool:
        return self._held(member) == self._versions.published.version

    def _held(self, member: Member) -> int:
        return member.version if self._weights == POLICY_WEIGHTS else member.others.get(self._weights, 0)

    def _set_version(self, member: Member, version: int) -> None:
        if self._weights == POLICY_WEIGHTS:
            member.version, member.step = version, self._versions.step_of(version)
            member.behind = member.behind and not self.is_up_to_date(member)
        else:
            member.others[self._weights] = version

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
                while self._versions.published == lost and self._refills == refills:
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
