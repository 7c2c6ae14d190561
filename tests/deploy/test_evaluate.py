"""`distrl eval`: a model measured in one process, with the numbers that a run would have."""

import asyncio
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from actors.engines.build import build_engine
from actors.engines.fake import FakeEngine
from deploy import evaluate
from deploy.commands.evaluate import _plain
from distrl.config import Config, load_config
from distrl.errors import ConfigError, DataError, StageError
from distrl.models import TinyArchitecture, load_tokenizer, make_tiny_model
from distrl.passk import accuracy, mean_pass_at_k
from distrl.rewards import Grade, make_grader
from distrl.sampling import Sample, SampleRequest
from distrl.seeding import Purpose
from distrl.tasks import Problem, load_task
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.builders import refusal, run, threaded
from tests.deploy.commands import call

PROBLEMS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("eval") / "model"
    size = TinyArchitecture(hidden_size=32, layers=1, heads=2, intermediate_size=32)
    make_tiny_model(directory, character_tokenizer(ALPHABET), seed=0, architecture=size)
    return directory


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config without a model."""
    monkeypatch.chdir(tmp_path)
    values = {
        "data": {"source": "sort_digits", "heldout_size": 2 * PROBLEMS, "options": {"digits": 3}},
        "rollout": {"max_new_tokens": 3, "group_size": 4},
        "generation": {"slots": 16},
        # Untrained, it never sorts; a digit in the response is what it manages sometimes.
        "reward": {"grader": f"{__name__}:has_a_low_digit"},
        "evaluation": {"problems": PROBLEMS},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def has_a_low_digit(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    correct = any(digit in response for digit in "012")
    return Grade(float(correct), {"low": float(correct)}, "correct" if correct else "wrong")


def fails_on_some(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    if answer < "1":
        raise ValueError("the grader is broken")
    return Grade(1.0, {}, "correct")


def fails(response: str, answer: str, metadata: Mapping[str, object]) -> Grade:
    raise ValueError("the grader is broken")


def load(config: Path, model: Path, *overrides: str) -> Config:
    return load_config(config, [f"model.path={model}", *overrides])


def measure(config: Config, *more: str, samples: int = 1, ks: Sequence[int] = ()) -> dict[str, Any]:
    return evaluate.evaluate_model(config, more, samples, ks, lambda *_: None)


def responses(config: Config, samples: int) -> list[list[Sample]]:
    """What is sampled for every held-out problem, straight from the engine, one problem after the other."""
    tokenizer = load_tokenizer(config.model.path)
    engine = build_engine(config, tokenizer)
    problems = load_task(config.data).heldout[: config.evaluation.problems]

    async def sample() -> list[list[Sample]]:
        found = []
        for index, problem in enumerate(problems):
            stream = (config.run.seed, int(Purpose.EVALUATION), index, 0)
            prompt = tuple(tokenizer.encode(problem.prompt))
            found.append(await engine.sample(SampleRequest("r", prompt, samples, config.sampling, stream)))
        await engine.close()
        return found

    sampled: list[list[Sample]] = run(sample())
    return sampled


def test_the_numbers_are_those_of_the_responses_that_a_run_would_sample(config: Path, model: Path) -> None:
    loaded = load(config, model)
    (found,) = measure(loaded, samples=4)["sets"]
    sampled = responses(loaded, 4)
    decode = load_tokenizer(model).decode
    correct = [sum(any(d in str(decode(s.token_ids)) for d in "012") for s in group) for group in sampled]
    assert 0 < sum(correct) < 4 * PROBLEMS, "the test would tell nothing"
    assert (found["name"], found["problems"], found["responses"], found["failed"]) == ("heldout", 12, 48, 0)
    expected = accuracy(4, correct)
    assert found["accuracy"] == {"value": expected.value, "low": expected.low, "high": expected.high}
    assert list(found["pass_at_k"]) == ["1", "2", "4"]
    for k, estimate in found["pass_at_k"].items():
        by_hand = mean_pass_at_k(4, correct, int(k), seed=0)
        assert estimate == {"value": by_hand.value, "low": by_hand.low, "high": by_hand.high}
    assert found["reward_mean"] == pytest.approx(expected.value)
    flat = [sample for group in sampled for sample in group]
    assert found["response_tokens_mean"] == sum(len(sample.token_ids) for sample in flat) / len(flat)
    assert 0 < found["cut_share"] == sum(sample.finish_reason == "length" for sample in flat) / len(flat) < 1
    assert [thread.name for thread in threading.enumerate() if thread.name == "distrl-decode"] == []


def test_more_responses_keep_those_that_were_there(config: Path, model: Path) -> None:
    loaded = load(config, model)
    assert [group[:1] for group in responses(loaded, 4)] == responses(loaded, 1)


def test_nothing_of_ray_is_started_and_no_run_is_made(config: Path, model: Path) -> None:
    measure(load(config, model))
    assert not ray.is_initialized()
    assert not (config.parent / "runs").exists()


def test_further_sets_are_measured_beside_the_configs_own(config: Path, model: Path) -> None:
    line = json.dumps({"prompt": "12>", "answer": "12"}) + "\n"
    (config.parent / "two.jsonl").write_text(2 * line + json.dumps({"prompt": "21>", "answer": "12"}) + "\n")
    (config.parent / "one.jsonl").write_text(line)
    found = measure(load(config, model, "reward.grader="), "two=two.jsonl", "one=one.jsonl", samples=2)
    described = [(one["name"], one["problems"], one["responses"], one["grader"]) for one in found["sets"]]
    # A repeated line is one problem.
    assert described == [("heldout", 12, 24, "exact"), ("two", 2, 4, "exact"), ("one", 1, 2, "exact")]
    graders = [one["grader"] for one in measure(load(config, model), "one=one.jsonl")["sets"]]
    assert graders == [f"{__name__}:has_a_low_digit"] * 2


def test_a_problem_that_cannot_be_judged_counts_neither_way(config: Path, model: Path) -> None:
    grader = f"reward.grader={__name__}:fails_on_some"
    loaded = load(config, model, grader)
    bad = [p for p in load_task(loaded.data).heldout[:PROBLEMS] if p.answer < "1"]
    assert 0 < len(bad) < PROBLEMS
    (found,) = measure(loaded, samples=2)["sets"]
    assert (found["failed"], found["problems"]) == (len(bad), PROBLEMS - len(bad))
    assert found["accuracy"]["value"] == 1.0
    assert found["first_failure"].endswith("ValueError: the grader is broken")


def test_prompts_that_the_model_cannot_read_fail_alone(config: Path, model: Path) -> None:
    prompts = ["12>", "what?", "1" * 300 + ">"]
    (config.parent / "odd.jsonl").write_text("".join(f'{{"prompt": "{p}", "answer": ""}}\n' for p in prompts))
    _, found = measure(load(config, model), "odd=odd.jsonl")["sets"]
    assert (found["problems"], found["failed"]) == (1, 2)
    assert found["first_failure"].startswith("prompt ")
    assert " cannot be tokenized: " in found["first_failure"]


def test_where_nothing_can_be_judged_the_last_cause_is_told(config: Path, model: Path) -> None:
    loaded = load(config, model, f"reward.grader={__name__}:fails", "evaluation.problems=1")
    problem = load_task(loaded.data).heldout[0]
    assert refusal(StageError, lambda: measure(loaded)) == (
        f"held-out set heldout: none of 1 problems could be judged; grader {__name__}:fails failed on prompt "
        f"{problem.prompt_id}, rollout {problem.prompt_id}.0: ValueError: the grader is broken"
    )


def test_an_engine_that_stops_ends_the_evaluation(config: Path, model: Path) -> None:
    loaded = load(config, model)
    engine = FakeEngine(fail=lambda _: StageError("generation engine: stopped by RuntimeError: out of memory"))

    class Words:
        def encode(self, text: str, messages: object) -> tuple[int, ...]:
            return (1,)

        def decode(self, token_ids: Sequence[int]) -> str:
            return ""

    sampler = evaluate.Sampler(engine, Words(), threaded("exact", make_grader("exact")), loaded, samples=1)
    heldout = evaluate.HeldOut("heldout", [Problem.of("a", "b"), Problem.of("c", "d")], {})
    with pytest.raises(StageError, match=r"^generation engine: stopped by RuntimeError: out of memory$"):
        asyncio.run(evaluate.measure_set(sampler, heldout, (1,), lambda *_: None))
    assert len(engine.requests) == 2


def test_progress_tells_of_every_problem(config: Path, model: Path) -> None:
    told: list[tuple[str, int, int]] = []
    evaluate.evaluate_model(load(config, model), (), 1, (), lambda *now: told.append(now))
    assert told == [("heldout", n, PROBLEMS) for n in range(1, PROBLEMS + 1)]


def test_away_from_a_terminal_ten_lines_tell_of_a_set(capsys: pytest.CaptureFixture[str]) -> None:
    for total, lines in ((1000, 10), (3, 3)):
        for done in range(1, total + 1):
            _plain("heldout", done, total)
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == lines
        assert said.err.splitlines()[-1] == f"heldout: {total} of {total} problems"


@pytest.mark.parametrize(
    ("more", "samples", "ks", "kind", "message"),
    [
        ([], 4, [8], ConfigError, "--k must be from 1 to --samples (4), got 8; raise --samples or leave it out"),
        ([], 4, [0], ConfigError, "--k must be from 1 to --samples (4), got 0; raise --samples or leave it out"),
        (["x"], 1, [], ConfigError, "--heldout must have the form name=path.jsonl, got 'x'; name the set"),
        (
            ["heldout=x.jsonl"],
            *(1, [], ConfigError),
            "--heldout must have a new name for each set, got 'heldout' twice; name one otherwise",
        ),
        (
            ["more=nowhere.jsonl"],
            *(1, [], DataError),
            "--heldout more must be a readable file of JSON lines, got 'nowhere.jsonl': No such file or directory; "
            "check the path",
        ),
        (
            ["more=broken.jsonl"],
            *(1, [], DataError),
            "--heldout more 'broken.jsonl' line 2 must be a JSON object, got '{' (Expecting property name enclosed in "
            "double quotes at column 2); fix or remove the line",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    more: list[str], samples: int, ks: list[int], kind: type[Exception], message: str, config: Path, model: Path
) -> None:
    (config.parent / "broken.jsonl").write_text('{"prompt": "12>", "answer": "12"}\n{\n')
    loaded = load(config, model)
    assert refusal(kind, lambda: measure(loaded, *more, samples=samples, ks=ks)) == message


def test_the_command_prints_numbers_on_one_stream_and_progress_on_the_other(
    config: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "eval",
        str(model),
        str(config),
        "run.seed=3",
        "model.path=another",
        "--samples",
        "4",
        "--k",
        "4",
        "--k",
        "1",
    )
    assert call(monkeypatch, *arguments, "--json") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert said.err.splitlines()[-1] == "heldout: 12 of 12 problems"
    assert (found["model"], found["samples"], found["seed"], found["temperature"]) == (str(model), 4, 3, 1.0)
    (one,) = found["sets"]
    assert list(one["pass_at_k"]) == ["1", "4"]

    assert call(monkeypatch, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    value, low, high = (one["accuracy"][key] for key in ("value", "low", "high"))
    assert lines[:3] == [
        f"{model}: 4 response(s) per problem at temperature 1, up to 3 tokens; 95% intervals in brackets",
        f"heldout: 12 problems, 0 failed, graded by {__name__}:has_a_low_digit",
        f"    accuracy   {value:.4f}  [{low:.4f}, {high:.4f}]",
    ]
    assert [line.split()[0] for line in lines[3:]] == ["pass@1", "pass@4", "reward", "tokens"]


def test_failures_are_told_on_the_error_stream(
    config: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grader = f"reward.grader={__name__}:fails_on_some"
    assert call(monkeypatch, "eval", str(model), str(config), grader) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("heldout: ")
    assert last.endswith(": ValueError: the grader is broken")


def test_a_model_that_is_not_there_is_refused(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "eval", "/nowhere: it is", str(config)) == 2
    assert capsys.readouterr().err == (
        "DataError: MODEL must be a local directory, got '/nowhere: it is'; names of a model hub are not downloaded\n"
    )


class AsksTwice:
    """Two messages; the second one is rewarded where either held a low digit."""

    def reset(self, problem: Problem) -> str:
        self._messages: list[str] = []
        return ""

    def step(self, message: str) -> tuple[str, float, bool]:
        self._messages.append(message)
        low = any(digit in text for text in self._messages for digit in "012")
        return "9", float(low), len(self._messages) == 2


def test_episodes_are_played_and_graded_by_their_environment(config: Path, model: Path) -> None:
    environment = [f"environment.name={__name__}:AsksTwice", "environment.max_turns=2", "reward.grader="]
    (found,) = measure(load(config, model, *environment, "rollout.max_new_tokens=40"))["sets"]
    assert (found["grader"], found["failed"]) == ("episode", 0)
    assert found["reward_mean"] > 0
    assert found["response_tokens_mean"] > 3  # two messages with their ends, and what stands between
