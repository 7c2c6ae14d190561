"""The staleness contract as pure functions: what may be issued, what a step may train, what it must wait for.

*Staleness* of a rollout is the number of optimizer steps between the oldest policy version that sampled one of its
tokens and the learner's version, along the tree of versions. `docs/staleness.md` has the argument.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distrl.errors import LedgerError


@dataclass(frozen=True, slots=True)
class Version:
    """One set of published weights. `step` counts optimizer steps from the start of the run."""

    version: int
    parent: int | None
    step: int


def staleness(versions: Mapping[int, Version], oldest: int, current: int) -> int:
    """Optimizer steps from version `oldest` to version `current` along the tree: up to the common ancestor, then down.

    Weights that are published again (same step, new version) add 0.

    Raises:
        LedgerError: a version that the ledger does not know, or two versions without a common ancestor.
    """
    return sum(way(versions, oldest, current))


def way(versions: Mapping[int, Version], oldest: int, current: int) -> tuple[int, int]:
    """Optimizer steps from a version up to its common ancestor with another, and from there down to the other.

    Steps up are steps that were taken and left: the version is of a branch that was abandoned. Errors are those of
    `staleness`.
    """
    low, high = oldest, current
    while low != high:
        # Of two versions the one with more steps is no ancestor of the other; of two with equal steps, republished
        # weights, the newer one is not.
        if (_get(versions, low).step, low) > (_get(versions, high).step, high):
            low = _parent(versions, low, oldest, current)
        else:
            high = _parent(versions, high, oldest, current)
    common = _get(versions, high).step
    return versions[oldest].step - common, versions[current].step - common


def most_stale(versions: Mapping[int, Version], sampled_by: Iterable[int], current: int) -> int:
    """Staleness of a ticket: that of its most stale token.

    Along one branch that is the token of the oldest version. Weights of a branch that was left may be younger and yet
    further away.

    Args:
        sampled_by: all versions that sampled one of its tokens.
    """
    return max(staleness(versions, version, current) for version in sampled_by)


def _get(versions: Mapping[int, Version], version: int) -> Version:
    if version not in versions:
        raise LedgerError(f"version {version} is not in the ledger, which knows {len(versions)} versions")
    return versions[version]


def _parent(versions: Mapping[int, Version], version: int, oldest: int, current: int) -> int:
    parent = versions[version].parent
    if parent is None:
        raise LedgerError(f"versions {oldest} and {current} have no common ancestor; the ledger's versions are damaged")
    return parent


@dataclass(frozen=True, slots=True)
class Outstanding:
    """A ticket that was issued and is not yet trained."""

    ticket_id: int
    oldest_step: int
    """Step of the oldest version that sampled, or may still sample, one of its tokens."""
    ready: bool


@dataclass(frozen=True, slots=True)
class Admission:
    """Bounds the age of what is trained.

    `max_staleness` in optimizer steps; `tickets_per_step` is the batch; 0 means on-policy, synchronous training.
    """

    max_staleness: int
    tickets_per_step: int

    @property
    def window(self) -> int:
        """Tickets that may be issued and not yet released; one more would be born too stale to be trained.

        A ticket is released when the version made by its step is *published*, not when it is trained: until then a
        new ticket would still be sampled from the older weights.
        """
        return (self.max_staleness + 1) * self.tickets_per_step

    def may_issue(self, outstanding: int, ready: int) -> bool:
        """Whether one more ticket may be issued.

        New tickets are held back once a full batch is ready: a learner that is the bottleneck would otherwise train
        every sample at the bound.
        """
        return outstanding < self.window and (ready < self.tickets_per_step)

    def oldest_step_for(self, position: int, published_step: int) -> int:
        """The oldest step whose weights may sample a new ticket with `position` tickets outstanding before it.

        In order of issue it is trained position // tickets_per_step steps after the one now under way.
        """
        return max(0, published_step + position // self.tickets_per_step - self.max_staleness)

    def trainable(self, outstanding: Iterable[Outstanding], step: int) -> frozenset[int]:
        """As many of these tickets as can all be trained in time from learner step `step` on.

        In the order of deadlines, each is taken whose place in the order comes before its deadline. Every ticket takes
        one place of equal length, so no other choice has more of them.
        """
        kept: list[int] = []
        for ticket in sorted(outstanding, key=lambda t: (t.oldest_step, t.ticket_id)):
            if ticket.oldest_step + self.max_staleness >= step + len(kept) // self.tickets_per_step:
                kept.append(ticket.ticket_id)
        return frozenset(kept)

    def choose(self, outstanding: Sequence[Outstanding], step: int) -> "Choice":
        """Which tickets the step from learner step `step` trains, or which it has to wait for.

        Earliest deadline first: ticket i may be trained at the latest by the step that starts at
        d_i = oldest_step_i + max_staleness. A step may be taken if the tickets left over can still all be trained in
        time, that is if for every k >= 0 at most k * tickets_per_step of them have d_i < step + 1 + k. The chosen
        batch leaves the largest slack of all batches (exchange argument), so the test is exact.
        """
        batch_size = self.tickets_per_step
        deadline = {t.ticket_id: t.oldest_step + self.max_staleness for t in outstanding}
        ready = sorted((t.ticket_id for t in outstanding if t.ready), key=lambda i: (deadline[i], i))
        chosen = frozenset(ready[:batch_size])
        left = sorted(deadline[t.ticket_id] for t in outstanding if t.ticket_id not in chosen)
        late = [d for n, d in enumerate(left) if d < step + 1 + n // batch_size]
        if len(chosen) == batch_size and not late:
            return Choice(tuple(sorted(chosen)), ())
        unready = [t for t in outstanding if not t.ready]
        if len(chosen) < batch_size:
            waiting = sorted(t.ticket_id for t in unready)
        else:
            waiting = sorted(t.ticket_id for t in unready if deadline[t.ticket_id] <= max(late))
        return Choice((), tuple(waiting))

    def overdue(self, outstanding: Iterable[Outstanding], step: int) -> tuple[int, ...]:
        """As few tickets as possible, none of them ready, without which the step from `step` on has its batch.

        None where fewer than `tickets_per_step` are ready: then the step lacks rollouts, and not time. The tickets left
        over by the batch are taken in the order of deadlines; where one would be too late, the first that is not ready
        gives up its place (Moore and Hodgson's rule for tasks of equal length).
        """
        size = self.tickets_per_step
        in_order = sorted(outstanding, key=lambda t: (t.oldest_step, t.ticket_id))
        batch = {t.ticket_id for t in [t for t in in_order if t.ready][:size]}
        if len(batch) < size:
            return ()
        given_up: list[int] = []
        waiting: deque[int] = deque()
        kept = 0
        for ticket in in_order:
            if ticket.ticket_id in batch:
                continue
            if not ticket.ready:
                waiting.append(ticket.ticket_id)
            kept += 1
            # Ready ones alone are in time, but for those that weights sampled which were left; see `trainable`.
            if ticket.oldest_step + self.max_staleness < step + 1 + (kept - 1) // size and waiting:
                given_up.append(waiting.popleft())
                kept -= 1
        return tuple(sorted(given_up))


@dataclass(frozen=True, slots=True)
class Choice:
    """Either a batch (ticket ids in order) or the tickets that the step waits for."""

    batch: tuple[int, ...]
    waiting_for: tuple[int, ...]
