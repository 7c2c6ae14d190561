"""Preferences are symmetrised over positions; an endpoint is a real HTTP server on this machine."""

import threading
from pathlib import Path
from typing import Any

import pytest

from distrl.errors import ConfigError, StageError
from distrl.graders.endpoint import EndpointJudge
from distrl.graders.preference import WinRate
from distrl.judges import symmetrised
from distrl.tasks import Problem
from tests.builders import refusal
from tests.graders.endpoint_server import Reply, says, server

PROBLEM = Problem.of("Say a number.", "")


class Table:
    """Prefers the larger number by as much as it is larger, and whatever comes first by `bias`."""

    version = "1"

    def __init__(self, bias: float = 0.0) -> None:
        self._bias = bias
        self.asked: list[tuple[str, str]] = []

    def prefer(self, problem: Problem, first: str, second: str) -> float:
        self.asked.append((first, second))
        return min(1.0, max(0.0, 0.5 + (float(first) - float(second)) / 10 + self._bias))


def test_both_orders_are_asked_and_a_bias_cancels() -> None:
    fair, biased = symmetrised(Table(), PROBLEM, "3", "1"), symmetrised(Table(bias=0.2), PROBLEM, "3", "1")
    assert fair.probability == pytest.approx(0.7)
    assert fair.disagreement == pytest.approx(0.0)
    # Forwards 0.9, backwards 1 - 0.5: the bias is in the disagreement and not in the preference.
    assert biased.probability == pytest.approx(0.7)
    assert biased.disagreement == pytest.approx(0.4)
    assert symmetrised(Table(0.2), PROBLEM, "1", "3").probability == pytest.approx(1 - biased.probability)


def test_a_judge_that_says_it_is_symmetric_is_asked_once() -> None:
    class Symmetric(Table):
        symmetric = True

    judge, plain = Symmetric(), Table()
    once, twice = (symmetrised(one, PROBLEM, "3", "1") for one in (judge, plain))
    assert (judge.asked, plain.asked) == ([("3", "1")], [("3", "1"), ("1", "3")])
    assert (once.probability, once.disagreement) == (pytest.approx(twice.probability), 0.0)
    judge.asked.clear()
    WinRate(judge, 5)([PROBLEM] * 4, ["1", "2", "3", "4"])
    assert len(judge.asked) == 6  # pairs


def test_a_judge_of_positions_prefers_nobody() -> None:
    preference = symmetrised(Table(bias=9.0), PROBLEM, "3", "1")
    assert (preference.probability, preference.disagreement) == (0.5, 1.0)


@pytest.mark.parametrize("opponents", [1, 2, 5])
def test_win_rates_are_those_of_the_pairs(opponents: int) -> None:
    judge = Table()
    responses = ["1", "2", "3", "4"]
    rewards = [g.reward for g in WinRate(judge, opponents)([PROBLEM] * 4, responses)]
    if opponents == 1:  # a circle: each meets its two neighbours
        assert rewards == pytest.approx([(0.4 + 0.2) / 2, (0.6 + 0.4) / 2, (0.6 + 0.4) / 2, (0.6 + 0.8) / 2])
        assert len(judge.asked) == 2 * 4
    else:
        assert rewards == pytest.approx([0.5 - 0.2, 0.5 - 0.2 / 3, 0.5 + 0.2 / 3, 0.5 + 0.2])
        assert len(judge.asked) == 2 * 6
    assert sum(rewards) == pytest.approx(2.0)


def test_prompts_are_judged_apart() -> None:
    judge = Table()
    other = Problem.of("Say another.", "")
    WinRate(judge)([PROBLEM, other, PROBLEM, other], ["1", "10", "2", "20"])
    assert {frozenset(pair) for pair in judge.asked} == {frozenset({"1", "2"}), frozenset({"10", "20"})}


def test_a_response_without_another_meets_the_reference_answer() -> None:
    (grade,) = WinRate(Table())([Problem.of("Say a number.", "5")], ["7"])
    assert (grade.reward, grade.verdict) == (pytest.approx(0.7), "correct")


def test_a_response_without_another_and_without_an_answer_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="at least two responses to a prompt"):
        WinRate(Table())([PROBLEM], ["1"])


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.1])
def test_what_is_no_probability_is_a_failure(value: float) -> None:
    class Odd(Table):
        def prefer(self, problem: Problem, first: str, second: str) -> float:
            return value

    with pytest.raises(ValueError, match="it must be a probability in"):
        WinRate(Odd())([PROBLEM] * 2, ["1", "2"])


# An endpoint -----------------------------------------------------------------------------------------------------


def larger_wins(request: dict[str, Any]) -> tuple[int, Any]:
    text = request["messages"][0]["content"]
    first = float(text.split("Response A:\n")[1].split("\n")[0])
    second = float(text.split("Response B:\n")[1].split("\n")[0])
    return says(f"I thought of [[tie]], but no: [[{'A' if first > second else 'B'}]]")


def test_the_endpoint_is_asked_in_both_orders_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    with server(larger_wins) as (url, seen):
        grades = EndpointJudge(url, "judge-1", key="env:JUDGE_KEY")([PROBLEM] * 2, ["7", "5"])
    assert [g.reward for g in grades] == [1.0, 0.0]
    assert grades[0].components == {"win_rate": 1.0, "disagreement": 0.0}
    assert {key for key, _ in seen} == {"Bearer s3cret"}
    assert [request["model"] for _, request in seen] == ["judge-1"] * 2
    assert len({request["messages"][0]["content"] for _, request in seen}) == 2


def test_a_response_cannot_fill_in_the_other_one() -> None:
    with server(lambda request: says("[[tie]]")) as (url, seen):
        EndpointJudge(url, "judge")([PROBLEM] * 2, ["{second}", "secret"])
    assert all(request["messages"][0]["content"].count("secret") == 1 for _, request in seen)


def test_a_judge_that_always_says_a_has_no_preference_and_full_disagreement() -> None:
    with server(lambda request: says("[[A]]")) as (url, _):
        grades = EndpointJudge(url, "judge")([PROBLEM] * 2, ["7", "5"])
    assert [(g.reward, g.components["disagreement"]) for g in grades] == [(0.5, 1.0)] * 2


def test_a_busy_endpoint_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrl.graders.endpoint.time.sleep", lambda seconds: None)
    statuses = iter([503, 429])
    with server(lambda request: (next(statuses, 200), larger_wins(request)[1])) as (url, seen):
        grades = EndpointJudge(url, "judge", parallel=1)([PROBLEM] * 2, ["7", "5"])
    assert [g.reward for g in grades] == [1.0, 0.0]
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (lambda request: (401, {"error": "who are you"}), 'status 401: {"error": "who are you"}'),
        (lambda request: says("I like both"), "its answer must hold [[A]], [[B]] or [[tie]], got 'I like both'"),
        (lambda request: (200, b"<html>"), "2 attempts failed, the last with JSONDecodeError"),
        (lambda request: (200, {"choices": []}), "2 attempts failed, the last with ValueError: an answer without"),
        (lambda request: (500, {}), "2 attempts failed, the last with status 500"),
    ],
)
def test_no_answer_is_a_failure_and_no_reward(reply: Reply, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrl.graders.endpoint.time.sleep", lambda seconds: None)
    with server(reply) as (url, _), pytest.raises(StageError) as caught:
        EndpointJudge(url, "judge", attempts=2)([PROBLEM] * 2, ["7", "5"])
    assert cause in str(caught.value)


def test_a_late_endpoint_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def late(request: dict[str, Any]) -> tuple[int, Any]:
        gate.wait(10)
        return says("[[A]]")

    with server(late) as (url, _):
        with pytest.raises(StageError, match="1 attempts failed, the last with TimeoutError"):
            EndpointJudge(url, "judge", timeout_s=0.2, attempts=1)([PROBLEM] * 2, ["7", "5"])
        gate.set()


def test_a_key_goes_by_reference_only(tmp_path: Path) -> None:
    def judge(key: str) -> EndpointJudge:
        return EndpointJudge("http://127.0.0.1:1/v1", "judge", key=key)

    said = refusal(ConfigError, lambda: judge("sk-abcdef"))
    assert said == (
        "options.key of the grader judge must say where the key is, as env:NAME or file:PATH, got something else; "
        "the key itself does not belong into a config"
    )
    assert refusal(ConfigError, lambda: judge("env:NOT_THERE_AT_ALL")) == (
        "options.key of the grader judge must name a key that is there, got 'env:NOT_THERE_AT_ALL', which is not; "
        "set it"
    )
    (tmp_path / "key").write_text("s3cret\n")
    judge(f"file:{tmp_path / 'key'}")
