"""The warning that a run stands still: which stage, which process, since when."""

import time
from typing import Any

import pytest

from deploy.stall import StallWatch
from distrl.messages import Whereabouts

NODE = "head"
PROCESSES = {
    name: Whereabouts(pid, NODE, "", 0)
    for name, pid in {"generation-0": 10, "grading-1": 21, "reference-0": 30, "journal": 40, "replay-0": 50}.items()
}
LEARNER = {"where": Whereabouts(60, NODE, "", 0), "does": "waits for the batch of step 4", "since_s": 61.0}


def snapshot(**changes: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"step": 3, "rollouts": {"generation": 8}, "tickets": {"issued": 2}}
    members = [{"stage": name.split("-")[0], "name": name, "loading": None} for name in PROCESSES if "-" in name]
    busy = {"generation": 1, "grading": 0, "reference": 0, "replay": 0}
    waiting = {"oldest": None, "granted": 0, "learner_waiting": True, "evaluating": None, "learner": LEARNER}
    return {**state, **waiting, "members": members, "busy": busy, **changes}


def ticket(*calls: tuple[str, str]) -> dict[str, Any]:
    """A ticket that is in these (stage, process)."""
    return {
        "ticket": 17,
        "stage": calls[0][0],
        "since_s": 58.2,
        "calls": [{"stage": stage, "process": process, "since_s": 58.2} for stage, process in calls],
    }


def told(seen: dict[str, Any]) -> str | None:
    watch = StallWatch(warning_s=60)
    assert watch.look(seen, 0, PROCESSES) is None
    return watch.look(seen, 61, PROCESSES)


STRAGGLER = snapshot(oldest=ticket(("grading", "grading-1")))


def test_standing_still_is_told_once_per_span() -> None:
    watch = StallWatch(warning_s=60)
    said = [watch.look(STRAGGLER, now, PROCESSES) for now in (0, 59, 60, 61, 119, 120)]
    assert said == [
        None,
        None,
        "no progress for 60 s: ticket 17 is in grading at grading-1 (process 21 on head) for 58 s",
        None,
        None,
        "no progress for 120 s: ticket 17 is in grading at grading-1 (process 21 on head) for 58 s",
    ]


def test_any_progress_starts_the_clock_again() -> None:
    watch = StallWatch(warning_s=60)
    assert watch.look(STRAGGLER, 0) is None
    assert watch.look({**STRAGGLER, "rollouts": {"generation": 12}}, 59) is None
    assert watch.look({**STRAGGLER, "rollouts": {"generation": 12}}, 100) is None


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ((("generation", "generation-0"),), "is in generation at generation-0 (process 10 on head) for 58 s"),
        ((("reference", "reference-0"),), "is in reference at reference-0 (process 30 on head) for 58 s"),
        ((("journal", "journal"),), "is in journal at journal (process 40 on head) for 58 s"),
        ((("replay", "replay-0"),), "is in replay at replay-0 (process 50 on head) for 58 s"),
        ((("grading", ""),), "waits for a place in grading for 58 s"),
        (
            (("grading", "grading-1"), ("reference", "")),
            "is in grading at grading-1 (process 21 on head) for 58 s and waits for a place in reference for 58 s",
        ),
    ],
)
def test_a_ticket_is_told_with_the_stages_and_processes_that_have_it(
    calls: tuple[tuple[str, str], ...], message: str
) -> None:
    assert told(snapshot(oldest=ticket(*calls))) == f"no progress for 61 s: ticket 17 {message}"


def test_a_process_that_the_supervisor_does_not_know_yet_is_told_by_its_name() -> None:
    watch = StallWatch(warning_s=60)
    watch.look(STRAGGLER, 0)
    assert watch.look(STRAGGLER, 60) == "no progress for 60 s: ticket 17 is in grading at grading-1 for 58 s"


@pytest.mark.parametrize(
    ("granted", "does"),
    [
        (4, "trains step 4 on 4 tickets"),
        (0, "publishes policy version 5"),
        (0, "loads its weights"),
        (0, "has published policy version 5 and asks for no batch, or makes a checkpoint"),
    ],
)
def test_a_learner_that_does_something_is_told_with_what_and_since_when(granted: int, does: str) -> None:
    seen = snapshot(granted=granted, learner_waiting=False, learner={**LEARNER, "does": does})
    assert told(seen) == f"no progress for 61 s: the learner (process 60 on head) {does}, for 61 s"


def test_a_publication_that_everybody_waits_for() -> None:
    seen = snapshot(publishing={"version": 5, "since_s": 61.0})
    assert told(seen) == ("no progress for 61 s: the learner (process 60 on head) publishes policy version 5, for 61 s")


def test_a_learner_that_never_came_has_no_process() -> None:
    nobody = {"where": None, "does": "has not begun", "since_s": None}
    seen = snapshot(learner_waiting=False, learner=nobody)
    assert told(seen) == "no progress for 61 s: the learner has not begun"


def test_an_evaluation_that_everybody_waits_for() -> None:
    calls = [{"stage": "generation", "process": "generation-0", "since_s": 60.0}]
    seen = snapshot(evaluating={"name": "during", "problem": 3, "calls": calls})
    assert told(seen) == (
        "no progress for 61 s: the evaluation 'during' waits: its problem 3 is in generation at generation-0 (process "
        "10 on head) for 60 s"
    )


def test_weights_that_do_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1061.0)
    members = [
        {"stage": "generation", "name": "generation-0", "loading": (5, 1000.0)},
        {"stage": "generation", "name": "generation-1", "loading": (5, 1030.0)},
    ]
    seen = snapshot(members=members, busy={"generation": 0})
    assert told(seen) == "no progress for 61 s: generation-0 (process 10 on head) loads policy version 5 for 61 s"


def test_a_stage_without_a_process() -> None:
    seen = snapshot(members=[m for m in snapshot()["members"] if m["stage"] != "generation"])
    assert told(seen) == "no progress for 61 s: the learner waits, and no process of generation is there"


def test_nothing_is_under_way() -> None:
    assert told(snapshot()) == "no progress for 61 s: the learner waits, and no ticket is under way, for 61 s"
