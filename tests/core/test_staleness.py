"""The staleness contract: distances in the tree of versions, and a simulation of everything that issue, sampling,
completion, drops and publication can do in any order."""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distrl.errors import LedgerError
from distrl.staleness import Admission, Choice, Outstanding, Version, most_stale, staleness
from tests.builders import refusal

# The tree of versions -------------------------------------------------------------------------------------------


def tree(*rows: tuple[int, int | None, int]) -> dict[int, Version]:
    return {version: Version(version, parent, step) for version, parent, step in rows}


#   0 -- 1 -- 2 -- 3            steps 0 1 2 3; the learner died after step 3,
#         \-- 4 -- 5 -- 6       published step 1 again as version 4, and went on with other weights
FORKED = tree((0, None, 0), (1, 0, 1), (2, 1, 2), (3, 2, 3), (4, 1, 1), (5, 4, 2), (6, 5, 3))


@pytest.mark.parametrize(
    ("oldest", "current", "steps"),
    [
        (3, 3, 0),
        (0, 3, 3),
        (1, 4, 0),  # published again: the same weights
        (1, 6, 2),
        (4, 6, 2),
        (2, 4, 1),  # one step up the abandoned branch, none down
        (3, 6, 2 + 2),  # two steps up to version 1, two down
        (0, 6, 3),
    ],
)
def test_staleness_counts_steps_up_to_the_common_ancestor_and_down(oldest: int, current: int, steps: int) -> None:
    assert staleness(FORKED, oldest, current) == steps


def test_the_most_stale_token_need_not_be_of_the_oldest_version() -> None:
    # Version 4 is version 1 again: a rollout that began on 1, went on on the branch that was left, and ended on 4.
    assert most_stale(FORKED, (1, 3, 4), 4) == staleness(FORKED, 3, 4) == 2
    assert staleness(FORKED, 1, 4) == 0
    assert most_stale(FORKED, (0, 1), 6) == staleness(FORKED, 0, 6) == 3


@given(
    st.lists(st.integers(-3, 4), max_size=7),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_as_many_tickets_as_possible_are_kept_that_can_all_be_trained_in_time(
    oldest_steps: list[int], max_staleness: int, per_step: int, step: int
) -> None:
    """Second route: every larger subset, trained in the order of deadlines, the best one (docs/staleness.md)."""
    admission = Admission(max_staleness, per_step)
    outstanding = [Outstanding(i, o, True) for i, o in enumerate(oldest_steps)]
    kept = admission.trainable(outstanding, step)

    def in_time(subset: Iterable[int]) -> bool:
        order = sorted(subset, key=lambda i: oldest_steps[i])
        return all(step + place // per_step <= oldest_steps[i] + max_staleness for place, i in enumerate(order))

    assert in_time(kept)
    larger = itertools.combinations(range(len(oldest_steps)), len(kept) + 1)
    assert not any(in_time(subset) for subset in larger)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), max_size=30), st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=150, deadline=None)
def test_staleness_is_the_length_of_the_only_way_through_the_tree(
    rows: list[tuple[int, int]], oldest: int, current: int
) -> None:
    """Second route: relax an undirected graph whose edges are as long as the steps between parent and child."""
    versions = tree((0, None, 0))
    for version, (parent, steps) in enumerate(rows, start=1):
        at = versions[parent % version]
        versions[version] = Version(version, at.version, at.step + steps)
    oldest, current = oldest % len(versions), current % len(versions)

    distance = {oldest: 0}
    for _ in versions:
        for v in versions.values():
            if v.parent is None:
                continue
            length = v.step - versions[v.parent].step
            for a, b in ((v.version, v.parent), (v.parent, v.version)):
                if a in distance:
                    distance[b] = min(distance.get(b, 10**9), distance[a] + length)

    assert staleness(versions, oldest, current) == distance[current]


def test_an_unknown_version_and_a_tree_in_pieces_are_refused() -> None:
    assert refusal(LedgerError, lambda: staleness(FORKED, 9, 3)) == (
        "version 9 is not in the ledger, which knows 7 versions"
    )
    pieces = tree((0, None, 0), (1, None, 0))
    assert refusal(LedgerError, lambda: staleness(pieces, 0, 1)) == (
        "versions 0 and 1 have no common ancestor; the ledger's versions are damaged"
    )


# One decision, against brute force ------------------------------------------------------------------------------


@cache
def can_all_be_trained(deadlines: tuple[int, ...], step: int, batch_size: int) -> bool:
    """Whether some schedule trains every ticket, at most `batch_size` a step, none after its deadline: tries all."""
    if not deadlines:
        return True
    if min(deadlines) < step:
        return False
    positions = range(len(deadlines))
    return any(
        can_all_be_trained(tuple(deadlines[i] for i in positions if i not in batch), step + 1, batch_size)
        for batch in itertools.combinations(positions, min(batch_size, len(deadlines)))
    )


def possible_batches(admission: Admission, outstanding: Sequence[Outstanding], step: int) -> list[tuple[int, ...]]:
    """Every batch of ready tickets after which all others can still be in time."""
    ready = [t.ticket_id for t in outstanding if t.ready]
    return [
        batch
        for batch in itertools.combinations(ready, admission.tickets_per_step)
        if can_all_be_trained(
            tuple(t.oldest_step + admission.max_staleness for t in outstanding if t.ticket_id not in batch),
            step + 1,
            admission.tickets_per_step,
        )
    ]


STEP = 5


@st.composite
def situations(draw: st.DrawFn) -> tuple[Admission, list[Outstanding]]:
    admission = Admission(draw(st.integers(0, 3)), draw(st.integers(1, 3)))
    tickets = draw(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=5))
    outstanding = [
        Outstanding(i, STEP - admission.max_staleness + slack, ready) for i, (slack, ready) in enumerate(tickets)
    ]
    return admission, outstanding


@given(situations())
@settings(max_examples=250, deadline=None)
def test_a_step_is_taken_exactly_when_some_batch_leaves_all_others_in_time(
    situation: tuple[Admission, list[Outstanding]],
) -> None:
    admission, outstanding = situation
    choice = admission.choose(outstanding, STEP)
    possible = possible_batches(admission, outstanding, STEP)

    assert bool(choice.batch) == bool(possible)
    if choice.batch:
        assert choice.batch in possible
        assert choice.waiting_for == ()


@given(situations())
@settings(max_examples=250, deadline=None)
def test_a_batch_can_be_taken_once_what_it_waits_for_is_ready(situation: tuple[Admission, list[Outstanding]]) -> None:
    admission, outstanding = situation
    choice = admission.choose(outstanding, STEP)
    deadlines = tuple(t.oldest_step + admission.max_staleness for t in outstanding)
    assume(not choice.batch and can_all_be_trained(deadlines, STEP, admission.tickets_per_step))

    waiting = set(choice.waiting_for)
    assert waiting <= {t.ticket_id for t in outstanding if not t.ready}
    if len(outstanding) >= admission.tickets_per_step:
        assert waiting
        later = [Outstanding(t.ticket_id, t.oldest_step, t.ready or t.ticket_id in waiting) for t in outstanding]
        assert admission.choose(later, STEP).batch


@given(situations())
@settings(max_examples=250, deadline=None)
def test_no_fewer_tickets_could_be_drawn_again_for_a_step_to_have_its_batch(
    situation: tuple[Admission, list[Outstanding]],
) -> None:
    """Second route: every smaller set of tickets that are not ready, and every batch and schedule without them."""
    admission, outstanding = situation
    given_up = admission.overdue(outstanding, STEP)
    unready = [t.ticket_id for t in outstanding if not t.ready]
    ready = tuple(t.oldest_step + admission.max_staleness for t in outstanding if t.ready)
    assert set(given_up) <= set(unready)
    if len(ready) < admission.tickets_per_step:
        assert not given_up
    # What weights sampled that were left after a rollback may be ready and too late, and is another matter.
    assume(len(ready) >= admission.tickets_per_step)
    assume(can_all_be_trained(ready, STEP, admission.tickets_per_step))

    def without(ids: Iterable[int]) -> list[Outstanding]:
        return [t for t in outstanding if t.ticket_id not in set(ids)]

    assert admission.choose(without(given_up), STEP).batch
    for fewer in range(len(given_up)):
        assert not any(possible_batches(admission, without(s), STEP) for s in itertools.combinations(unready, fewer))


def test_the_first_that_is_late_is_drawn_again_and_the_others_are_left_alone() -> None:
    admission = Admission(max_staleness=3, tickets_per_step=1)
    outstanding = [Outstanding(0, 0, False), Outstanding(1, 3, False), Outstanding(2, 3, True)]
    assert admission.choose(outstanding, 3) == Choice((), (0,))
    assert admission.overdue(outstanding, 3) == (0,)
    assert admission.overdue([t for t in outstanding if not t.ready], 3) == ()  # without a batch nobody is late


def test_the_oldest_are_trained_first_and_listed_in_order_of_their_ids() -> None:
    admission = Admission(max_staleness=2, tickets_per_step=2)
    outstanding = [Outstanding(0, 5, True), Outstanding(1, 4, True), Outstanding(2, 5, False), Outstanding(3, 4, True)]
    assert admission.choose(outstanding, 5) == Choice((1, 3), ())


def test_a_step_waits_for_the_ticket_that_it_would_make_too_old() -> None:
    admission = Admission(max_staleness=3, tickets_per_step=1)
    # Ticket 0 may be trained from step 3 at the latest, so that the step from 3 must not go to ticket 2; ticket 1 has
    # until step 6, and nobody waits for it.
    outstanding = [Outstanding(0, 0, False), Outstanding(1, 3, False), Outstanding(2, 3, True)]
    assert admission.choose(outstanding, 3) == Choice((), (0,))


def test_an_incomplete_batch_waits_for_every_unready_ticket() -> None:
    admission = Admission(max_staleness=3, tickets_per_step=2)
    outstanding = [Outstanding(4, 0, True), Outstanding(7, 0, False), Outstanding(5, 1, False)]
    assert admission.choose(outstanding, 0) == Choice((), (5, 7))


def test_the_window_is_one_batch_per_step_of_staleness_and_the_one_under_way() -> None:
    assert Admission(0, 4).window == 4
    assert Admission(3, 4).window == 16


def test_tickets_are_held_back_by_the_window_and_by_a_full_ready_batch() -> None:
    admission = Admission(max_staleness=2, tickets_per_step=4)
    assert admission.may_issue(outstanding=11, ready=3)
    assert not admission.may_issue(outstanding=12, ready=3)
    assert not admission.may_issue(outstanding=11, ready=4)


@pytest.mark.parametrize(
    ("position", "published", "oldest"),
    [
        (0, 0, 0),  # nothing is older than the start
        (0, 5, 3),  # trained by the step under way, from step 5
        (3, 5, 3),
        (4, 5, 4),  # one batch before it
        (11, 5, 5),  # last place of the window: only the newest weights
    ],
)
def test_each_batch_before_a_new_ticket_takes_one_step_from_the_age_of_its_weights(
    position: int, published: int, oldest: int
) -> None:
    assert Admission(max_staleness=2, tickets_per_step=4).oldest_step_for(position, published) == oldest


# The whole system -----------------------------------------------------------------------------------------------

Choose = Callable[[Admission, Sequence[Outstanding], int], Choice]


def fifo(admission: Admission, outstanding: Sequence[Outstanding], step: int) -> Choice:
    """The mutant: takes ready tickets in order of issue and never looks at a deadline."""
    ready = sorted(t.ticket_id for t in outstanding if t.ready)[: admission.tickets_per_step]
    return Choice(tuple(ready) if len(ready) == admission.tickets_per_step else (), ())


def one_step_ahead(admission: Admission, outstanding: Sequence[Outstanding], step: int) -> Choice:
    """A subtler mutant: earliest deadline first, but it waits only for tickets whose deadline is this step."""
    ready = sorted((t.oldest_step, t.ticket_id) for t in outstanding if t.ready)[: admission.tickets_per_step]
    due = [t for t in outstanding if not t.ready and t.oldest_step + admission.max_staleness <= step]
    if len(ready) < admission.tickets_per_step or due:
        return Choice((), tuple(t.ticket_id for t in due))
    return Choice(tuple(sorted(i for _, i in ready)), ())


@dataclass
class System:
    """A coordinator, some generation actors and a learner, one event at a time, in an order that others choose.

    What happens at the boundary is what `actors.coordinator` does: a ticket is issued to an actor whose weights are
    new enough; its oldest version is known when it is sampled; granted and trained tickets count as outstanding
    until the weights that they made are published. The learner may have its next batch before that, and says only
    afterwards that it has trained it.
    """

    admission: Admission
    actors: int
    choose: Choose = Admission.choose
    redraws: bool = False
    redrawn: int = 0
    published: int = 0
    granted: int = 0
    unreleased: int = 0
    steps: int = 0
    issued: int = 0
    loaded: list[int] = field(default_factory=list)
    flights: dict[int, Outstanding] = field(default_factory=dict)
    sampled: set[int] = field(default_factory=set)
    sampled_by: dict[int, int] = field(default_factory=dict)
    ages: list[int] = field(default_factory=list)
    batches: list[tuple[int, ...]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loaded = [0] * self.actors

    def choice(self) -> Choice:
        return self.choose(self.admission, list(self.flights.values()), self.steps)

    def late(self) -> tuple[int, ...]:
        return self.admission.overdue(self.flights.values(), self.steps) if self.redraws else ()

    def leave(self, ticket: int) -> None:
        del self.flights[ticket]
        self.sampled.discard(ticket)

    def may_issue(self, actor: int, version: int | None = None) -> bool:
        outstanding = len(self.flights) + self.granted + self.unreleased
        ready = sum(t.ready for t in self.flights.values())
        step = self.loaded[actor] if version is None else version
        return self.admission.may_issue(outstanding, ready) and step >= self.admission.oldest_step_for(
            outstanding, self.published
        )

    def events(self) -> list[tuple[str, int]]:
        """Everything that could happen next, apart from drops."""
        found = [("issue", a) for a in range(self.actors) if self.may_issue(a)]
        found += [("pull", a) for a in range(self.actors) if self.loaded[a] < self.published]
        found += [("sample", i) for i in self.flights if i not in self.sampled]
        found += [("ready", i) for i in self.flights if i in self.sampled and not self.flights[i].ready]
        if self.unreleased:
            found.append(("publish", 0))
        elif self.granted:
            found.append(("train", 0))
        if self.granted:
            pass
        elif self.choice().batch:
            found.append(("grant", 0))
        elif self.late():
            found.append(("redraw", 0))
        return found

    def happen(self, event: str, who: int, whim: int) -> None:
        match event:
            case "issue":
                self.flights[self.issued] = Outstanding(self.issued, self.loaded[who], ready=False)
                self.sampled_by[self.issued] = who
                self.issued += 1
            case "pull":
                self.loaded[who] += 1 + whim % (self.published - self.loaded[who])
            case "sample":  # its first token came from any of the versions that the actor held since the issue
                first, newest = self.flights[who].oldest_step, self.loaded[self.sampled_by[who]]
                self.flights[who] = Outstanding(who, first + whim % (newest - first + 1), ready=False)
                self.sampled.add(who)
            case "ready":
                self.flights[who] = Outstanding(who, self.flights[who].oldest_step, ready=True)
            case "drop":
                self.leave(who)
                self.dropped.append(who)
            case "redraw":  # issued again later, to an actor whose weights are new enough then
                for late in self.late():
                    self.leave(late)
                    self.redrawn += 1
            case "grant":
                batch = self.choice().batch
                assert len(set(batch)) == self.admission.tickets_per_step
                tickets = [self.flights.pop(i) for i in batch]
                assert all(t.ready for t in tickets)
                self.ages += [self.steps - t.oldest_step for t in tickets]
                self.batches.append(batch)
                self.granted = len(batch)
                self.steps += 1
            case "train":
                self.granted, self.unreleased = 0, self.granted
            case "publish":
                self.published, self.unreleased = self.published + 1, 0

    def run(self, whims: Iterable[int], drops: bool) -> None:
        for whim in whims:
            events = self.events()
            unready = [i for i, t in self.flights.items() if not t.ready]
            if drops and unready and whim % 16 == 0:
                self.happen("drop", unready[whim // 16 % len(unready)], whim)
                continue
            assert events, f"nothing can ever happen again: {self}"
            self.happen(*events[whim // 16 % len(events)], whim // 4096)

    def check_that_the_learner_will_be_served(self) -> None:
        """While the learner asks: there is a batch, or a ticket on its way that is waited for, or room for one."""
        if self.granted or self.unreleased:
            return  # a publication waits for nobody
        choice = self.choice()
        coming = set(choice.waiting_for) & {i for i, t in self.flights.items() if not t.ready}
        assert choice.batch or coming or self.may_issue(0, version=self.published), f"the learner starves: {self}"


SCHEDULES = st.lists(st.integers(0, 2**20), min_size=20, max_size=120)


@given(st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), SCHEDULES, st.booleans(), st.booleans())
@settings(max_examples=250, deadline=None)
def test_no_ticket_is_trained_beyond_the_bound_and_the_learner_is_always_served(
    max_staleness: int, tickets_per_step: int, actors: int, whims: list[int], drops: bool, redraws: bool
) -> None:
    system = System(Admission(max_staleness, tickets_per_step), actors, redraws=redraws)
    for whim in whims:
        system.run([whim], drops)
        system.check_that_the_learner_will_be_served()
        if system.late() and not system.granted:
            system.happen("redraw", 0, 0)
            assert system.choice().batch  # nobody is waited for

    assert max(system.ages, default=0) <= max_staleness
    assert system.steps - system.published <= 2
    trained = [i for batch in system.batches for i in batch]
    assert len(set(trained)) == len(trained)


def schedules(seed: int) -> Iterable[int]:
    rng = random.Random(seed)
    return (rng.randrange(2**20) for _ in range(200))


@pytest.mark.parametrize("tickets_per_step", [1, 2, 3])
def test_with_no_staleness_allowed_batches_come_in_exact_order_of_issue(tickets_per_step: int) -> None:
    steps = 0
    for seed in range(20):
        system = System(Admission(0, tickets_per_step), actors=2)
        system.run(schedules(seed), drops=True)
        kept = [i for i in range(system.issued) if i not in system.dropped]
        trained = [i for batch in system.batches for i in batch]
        assert trained == kept[: len(trained)]
        assert set(system.ages) <= {0}
        steps += system.steps
    assert steps > 100


@pytest.mark.parametrize(
    ("choose", "admission"),
    [(fifo, Admission(1, 1)), (fifo, Admission(1, 2)), (fifo, Admission(3, 2)), (one_step_ahead, Admission(2, 1))],
)
def test_the_bound_is_not_vacuous(choose: Choose, admission: Admission) -> None:
    """A learner that does not look ahead at deadlines breaks it in some of the schedules, where `choose` keeps it."""
    broken = 0
    for seed in range(100):
        mutant, system = System(admission, 2, choose), System(admission, 2)
        mutant.run(schedules(seed), drops=False)
        system.run(schedules(seed), drops=False)
        assert max(system.ages) <= admission.max_staleness
        broken += max(mutant.ages, default=0) > admission.max_staleness
    assert broken


def test_tickets_are_drawn_again_only_in_asynchronous_training() -> None:
    redrawn = []
    for bound in (0, 1, 2):
        systems = [System(Admission(bound, 2), actors=2, redraws=True) for _ in range(20)]
        for seed, system in enumerate(systems):
            system.run(schedules(seed), drops=False)
            assert max(system.ages) <= bound
        redrawn.append(sum(s.redrawn for s in systems))
    assert redrawn[0] == 0
    assert all(redrawn[1:])


def test_the_bound_is_reached() -> None:
    """The window is not smaller than it has to be: some tickets are trained at the bound."""
    oldest = 0
    for seed in range(20):
        system = System(Admission(2, 2), actors=2)
        system.run(schedules(seed), drops=False)
        oldest = max(oldest, *system.ages)
    assert oldest == 2


def test_one_more_ticket_than_the_window_would_break_the_bound() -> None:
    """Tickets issued from one version in a row: the last of the window is trained at the bound, the next beyond."""
    admission = Admission(max_staleness=2, tickets_per_step=3)
    for extra, oldest in ((0, 2), (1, 3)):
        outstanding = [Outstanding(i, 0, True) for i in range(admission.window + extra)]
        assert (len(outstanding) - 1) // admission.tickets_per_step == oldest
        assert bool(admission.choose(outstanding, 0).batch) == (extra == 0)
