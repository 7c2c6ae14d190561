"""The pool: who gets the next call, and that nobody waits beside a free place."""

import asyncio

from actors.calls import LocalCaller
from actors.pool import Member, Pool
from tests.builders import run


def make_pool(*capacities: int) -> Pool:
    pool = Pool("grading")
    for i, capacity in enumerate(capacities):
        pool.add(LocalCaller(f"grading-{i}", object()), capacity)
    return pool


def test_a_place_is_taken_at_the_member_that_is_least_busy_for_its_size() -> None:
    pool = make_pool(2, 8)
    names = [member.name for _ in range(10) if (member := pool.take()) is not None]
    # 0/2 = 0/8 goes to the first, then 1/2 is more than 0/8 ... 3/8; at 4/8 they tie again.
    assert names == ["grading-0"] + ["grading-1"] * 4 + ["grading-0"] + ["grading-1"] * 4
    assert pool.take() is None
    assert pool.busy == 10


def test_a_call_of_several_places_needs_them_at_one_member() -> None:
    pool = make_pool(4, 4)
    assert [m.name for m in (pool.take(3), pool.take(3)) if m is not None] == ["grading-0", "grading-1"]
    assert pool.take(2) is None  # one place is free at each
    assert pool.take(1) is not None


def test_only_a_member_that_fits_is_taken() -> None:
    pool = make_pool(1, 1)
    pool.members[1].step = 3
    member = pool.take(fits=lambda m: m.step >= 2)
    assert member is pool.members[1]
    assert pool.take(fits=lambda m: m.step >= 2) is None
    assert pool.busy == 1


def test_whoever_waits_gets_the_place_that_becomes_free() -> None:
    async def scenario() -> None:
        pool = make_pool(1)
        first = await pool.wait_take()
        waiter = asyncio.create_task(pool.wait_take())
        await asyncio.sleep(0)
        assert not waiter.done()
        await pool.give_back(first)
        assert await waiter is first
        assert pool.busy == 1

    run(scenario())


def test_of_two_that_wait_only_one_gets_the_place_and_the_other_the_next() -> None:
    async def scenario() -> None:
        pool = make_pool(1)
        member = await pool.wait_take()
        waiters = [asyncio.create_task(pool.wait_take()) for _ in range(2)]
        await pool.give_back(member)
        done, pending = await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        assert (len(done), len(pending), pool.busy) == (1, 1, 1)
        await pool.give_back(member)
        await asyncio.gather(*pending)

    run(scenario())


def test_a_waiter_is_woken_when_a_member_s_version_changes() -> None:
    async def scenario() -> None:
        pool = make_pool(2)

        def new_enough(member: Member) -> bool:
            return member.step >= 1

        waiter = asyncio.create_task(pool.wait_take(2, new_enough))
        await asyncio.sleep(0)
        assert not waiter.done()
        pool.members[0].step = 1
        await pool.changed()
        assert (await waiter).busy == 2

    run(scenario())


def test_a_waiter_that_gives_up_leaves_the_place_to_others() -> None:
    async def scenario() -> None:
        pool = make_pool(1)
        member = await pool.wait_take()
        quitter, waiter = (asyncio.create_task(pool.wait_take()) for _ in range(2))
        await asyncio.sleep(0)
        quitter.cancel()
        await pool.give_back(member)
        assert await waiter is member
        assert quitter.cancelled()
        assert pool.busy == 1

    run(scenario())


def test_listeners_hear_of_every_change() -> None:
    async def scenario() -> None:
        pool = make_pool(1)
        heard: list[int] = []
        pool.on_change(lambda: heard.append(pool.busy))
        member = pool.take()
        assert member is not None
        await pool.give_back(member)
        await pool.changed()
        assert heard == [0, 0]

    run(scenario())


def test_a_member_that_is_lost_gets_nothing_more_and_its_places_are_not_counted() -> None:
    async def scenario() -> None:
        pool = make_pool(2, 2)
        first = pool.take()
        assert first is pool.members[0]
        await pool.lose(first, "killed")
        assert (pool.busy, pool.lost) == (0, {"grading-0": "killed"})
        await pool.give_back(first)
        assert pool.busy == 0
        assert {m.name for _ in range(2) if (m := pool.take()) is not None} == {"grading-1"}
        assert pool.take() is None

    run(scenario())


def test_whoever_waits_gets_a_place_at_a_member_that_joins() -> None:
    async def scenario() -> None:
        pool = Pool("grading")
        waiter = asyncio.create_task(pool.wait_take())
        await asyncio.sleep(0)
        member = pool.add(LocalCaller("grading-1", object()), 1)
        await pool.changed()
        assert await waiter is member

    run(scenario())


def test_one_that_drains_or_lacks_the_newest_weights_gets_nothing_new() -> None:
    pool = make_pool(1, 1, 1)
    pool.members[0].draining = True
    pool.members[1].behind = True
    assert pool.take() is pool.members[2]
    assert pool.take() is None


def test_a_member_is_blamed_when_different_tickets_fail_there_while_others_succeed_elsewhere() -> None:
    pool = make_pool(4, 4)
    bad, good = pool.members
    assert [pool.failed(bad, [ticket], 2) for ticket in (1, 1)] == [False, False]  # the same ticket: it may be that
    assert not pool.failed(bad, [2], 2)  # nothing succeeded elsewhere since: it may be the grader
    pool.succeeded(good)
    assert pool.failed(bad, [3], 2)
    pool.succeeded(bad)
    assert not pool.failed(bad, [4], 2)
