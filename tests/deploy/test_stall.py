"""The warning that a run stands still."""

from typing import Any

from deploy.stall import StallWatch


def snapshot(**changes: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"step": 3, "rollouts": {"generation": 8}, "tickets": {"issued": 2}}
    return {**state, "oldest": None, "granted": 0, "learner_waiting": True, **changes}


STRAGGLER = snapshot(oldest={"ticket": 17, "stage": "grading", "since_s": 58.2})


def test_standing_still_is_told_once_per_span_with_stage_and_ticket() -> None:
    watch = StallWatch(warning_s=60)
    told = [watch.look(STRAGGLER, now) for now in (0, 59, 60, 61, 119, 120)]
    assert told == [
        None,
        None,
        "no progress for 60 s: ticket 17 is in grading for 58 s",
        None,
        None,
        "no progress for 120 s: ticket 17 is in grading for 58 s",
    ]


def test_any_progress_starts_the_clock_again() -> None:
    watch = StallWatch(warning_s=60)
    assert watch.look(STRAGGLER, 0) is None
    assert watch.look({**STRAGGLER, "rollouts": {"generation": 12}}, 59) is None
    assert watch.look({**STRAGGLER, "rollouts": {"generation": 12}}, 100) is None


def test_without_a_ticket_under_way_it_is_the_learner_that_is_named() -> None:
    for changes, expected in (
        ({"granted": 4}, "the learner works on 4 tickets"),
        ({}, "the learner waits, and no ticket is under way"),
        ({"learner_waiting": False}, "the learner has not asked for a batch yet"),
    ):
        watch = StallWatch(warning_s=1)
        watch.look(snapshot(**changes), 0)
        assert watch.look(snapshot(**changes), 2) == f"no progress for 2 s: {expected}"
