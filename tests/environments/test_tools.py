"""Environments of ours: what a tool answers, and what ends an episode."""

import asyncio
from typing import Any

import pytest

from distrl.config import make_config
from distrl.environments import protocol
from distrl.environments.adapters import ReasoningGym, Verifiers
from distrl.environments.calculator import calculate
from distrl.environments.protocol import Step
from distrl.environments.registry import environment_factory
from distrl.environments.tools import Tools
from distrl.errors import ConfigError, StageError
from distrl.tasks import DataConfig, Message, Problem, load_task
from tests.builders import refusal

PROBLEM = Problem.of("What is 2 * 21?", "42")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 * 21", "42"),
        ("1 / 4", "0.25"),
        ("-(3 - 5) * 2", "4"),
        ("7 // 2 + 7 % 2", "4"),
        ("0.1 + 0.2", "0.3"),
        ("10 / 2", "5"),
        ("100 * 10", "1000"),
        ("1 / 0", None),
        ("2 ** 10", None),
        ("__import__('os')", None),
        ("1 if 2 else 3", None),
        ("True + 1", None),
        ("1" * 300, None),
        ("", None),
        ("(" * 100, None),
    ],
)
def test_the_calculator(expression: str, value: str | None) -> None:
    assert calculate(expression) == value


def test_a_call_gives_its_result_and_an_answer_ends_the_episode() -> None:
    tools = Tools()
    assert tools.reset(PROBLEM) == ""
    assert tools.step("Let me see <calculator>2 * 20</calculator>") == Step("\n<result>40</result>\n", 0.0, False)
    assert tools.step("<calculator>1</calculator> or <calculator>2 * 21</calculator>").observation == (
        "\n<result>42</result>\n"
    )
    assert tools.step("It is 42.") == Step("", 1.0, True)
    assert tools.step("It is 41.") == Step("", 0.0, True)


def test_the_marks_of_a_call_are_options() -> None:
    tools = Tools(open="[", close="]", result="{};", call_reward=-0.125, error="?")
    tools.reset(PROBLEM)
    assert tools.step("[2*]").observation == "?;"
    assert tools.step("[2*21]") == Step("42;", -0.125, False)


def test_python_runs_in_the_sandbox() -> None:
    tools = Tools(tools=("calculator", "python"))
    tools.reset(PROBLEM)
    step = tools.step("<python>import os\nprint(sum(range(10)), os.path.exists('/etc/passwd'))</python>")
    assert step.observation == "\n<result>45 False\n</result>\n"
    assert "ZeroDivisionError: division by zero" in tools.step("<python>1 / 0</python>").observation


def test_unknown_tools_and_options_are_refused() -> None:
    assert refusal(ConfigError, lambda: Tools(tools=("calculator", "browser"))) == (
        "environment.options.tools must be of calculator, python, got browser; remove what is not"
    )
    base = {"model": {"path": "model"}, "data": {"source": "sort_digits"}}
    unknown = make_config(base, ["environment.name=tool"])
    assert refusal(ConfigError, lambda: environment_factory(unknown)) == (
        "environment.name must be one of tools, reasoning_gym, verifiers or module:Class, got 'tool'; "
        "name the class as my_package.my_module:MyEnvironment"
    )
    options = make_config(base, ["environment.name=tools", "environment.options={tolls: 1}"])
    with pytest.raises(ConfigError, match=r"environment.options must be the arguments of tools, got \{'tolls': 1\}"):
        environment_factory(options)


def test_reasoning_gym_scores_every_answer_until_one_is_right() -> None:
    task = load_task(DataConfig(source="reasoning_gym", task="basic_arithmetic", train_size=4, heldout_size=2))
    problem = task.train[0]
    gym = ReasoningGym(attempts=3, hint="{}!")
    assert gym.reset(problem) == ""
    assert gym.step("no idea").done is False
    assert gym.step(f"<answer>{problem.answer}</answer>") == Step("1.0!", 1.0, True)
    gym.reset(problem)
    steps = [gym.step("no idea") for _ in range(3)]
    assert [s.done for s in steps] == [False, False, True]
    assert steps[0].reward == 0.0
    assert refusal(StageError, lambda: ReasoningGym().reset(PROBLEM)) == (
        "the problem must be one of reasoning-gym: set data.source to reasoning_gym"
    )


class _Rubric:
    """The face of a rubric of verifiers."""

    def __init__(self) -> None:
        self.funcs = [self.right, self.turns]
        self.weights = [1.0, 0.0]

    async def right(self, completion: list[dict[str, str]], answer: str) -> float:
        return float(completion[-1]["content"] == answer)

    def turns(self, state: dict[str, Any]) -> float:
        raise ValueError("of weight 0, never called")


class _Group:
    """Rubrics of rubrics: what a `MultiTurnEnv` makes of the one that it was given."""

    def __init__(self) -> None:
        self.rubrics = [_Rubric()]


class GuessEnvironment:
    """The face of a `MultiTurnEnv`: three guesses."""

    def __init__(self, guesses: int = 3) -> None:
        self.rubric = _Group()
        self.guesses = guesses

    async def setup_state(self, state: dict[str, Any]) -> None:
        state["seen"] = 0

    async def is_completed(self, state: dict[str, Any]) -> bool:
        right = bool(state["completion"]) and state["completion"][-1]["content"] == state["answer"]
        return right or len(state["trajectory"]) >= self.guesses

    async def env_response(self, messages: list[dict[str, str]], state: dict[str, Any]) -> list[dict[str, str]]:
        assert messages[0] == {"role": "user", "content": PROBLEM.prompt}
        state["seen"] += 1
        return [{"role": "user", "content": f"guess {state['seen']} is wrong"}]


def play(environment: Any, *messages: str) -> list[Step]:
    async def scenario() -> list[Step]:
        await protocol.reset(environment, PROBLEM)
        return [await protocol.step(environment, PROBLEM, message) for message in messages]

    return asyncio.run(scenario())


def test_an_environment_of_verifiers_is_played_and_scored() -> None:
    load = f"{__name__}:GuessEnvironment"
    assert play(Verifiers(load), "1", "42") == [Step("guess 1 is wrong", 0.0, False), Step("", 1.0, True)]
    assert play(Verifiers(load, {"guesses": 2}), "1", "2")[-1] == Step("", 0.0, True)


class Broken:
    """An environment that answers what a test wants."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def reset(self, problem: Problem) -> Any:
        return self._answer

    def step(self, message: str) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (ValueError("no"), "ValueError: no"),
        ((1, 0.0, True), "it must return (observation, reward, done), got (1, 0.0, True)"),
        (("", float("nan"), True), "reward must be a finite number, got nan"),
        (("", None, True), "reward must be a finite number, got None"),
    ],
)
def test_a_faulty_environment_fails_its_episode(answer: Any, cause: str) -> None:
    with pytest.raises(StageError) as caught:
        asyncio.run(protocol.step(Broken(answer), PROBLEM, "x"))
    assert str(caught.value) == f"environment Broken.step failed on prompt {PROBLEM.prompt_id}: {cause}"


def test_a_conversation_is_a_conversation() -> None:
    problem = Problem.of([Message("user", "2 * 21?")], "42")
    assert Tools().reset(problem) == ""
