"""An environment of tools: a message that calls one gets its result, any other message is the answer."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from distrl.environments.calculator import calculate
from distrl.environments.protocol import Step
from distrl.errors import ConfigError, StageError
from distrl.graders.registry import make_grader

if TYPE_CHECKING:
    from distrl.sandbox.limits import SandboxConfig
    from distrl.tasks.problem import Problem

Tool = Callable[[str], str]

KNOWN = ("calculator", "python")


class Tools:
    """Calculator and Python, called by text.

    A message calls a tool where it holds `<calculator>2 * 21</calculator>`; with several calls the last one counts. The
    tool's output comes back in `result`. A message without a call ends the episode with the grader's reward.

    Args:
        tools: of `calculator` and `python`; Python runs in the sandbox and gives what the program prints.
        open, close: what stands around a call, with `{tool}` for the tool's name.
        result: what the model reads, with `{}` for the output.
        grader: of the last message, by the problem's answer.
        call_reward: reward of a turn that calls a tool.
        longest: characters of the output that are kept.
        error: what the calculator says of what it cannot calculate.
    """

    def __init__(
        self,
        tools: Sequence[str] = ("calculator",),
        open: str = "<{tool}>",
        close: str = "</{tool}>",
        result: str = "\n<result>{}</result>\n",
        grader: str = "numeric",
        call_reward: float = 0.0,
        longest: int = 1000,
        error: str = "error",
        sandbox: "SandboxConfig | None" = None,
    ) -> None:
        if unknown := [tool for tool in tools if tool not in KNOWN]:
            raise ConfigError(
                f"environment.options.tools must be of {', '.join(KNOWN)}, got {', '.join(unknown)}; remove what is not"
            )
        self._tools: Mapping[str, Tool] = {
            tool: _calculator(error) if tool == "calculator" else _python(sandbox) for tool in tools
        }
        self._calls = {
            tool: re.compile(
                re.escape(open.format(tool=tool)) + "(.*?)" + re.escape(close.format(tool=tool)), re.DOTALL
            )
            for tool in tools
        }
        self._result = result
        self._grade = make_grader(grader, setting="environment.options.grader")
        self._call_reward = call_reward
        self._longest = longest
        self._problem: Problem | None = None

    def reset(self, problem: "Problem") -> str:
        self._problem = problem
        return ""

    def step(self, message: str) -> Step:
        if self._problem is None:
            raise StageError("environment Tools: reset must come before step")
        found = [
            (match.start(), tool, match[1]) for tool, call in self._calls.items() for match in call.finditer(message)
        ]
        if found:
            _, tool, content = max(found)
            return Step(self._result.format(self._tools[tool](content)[: self._longest]), self._call_reward, False)
        return Step("", self._grade([self._problem], [message])[0].reward, True)


def _calculator(error: str) -> Tool:
    def run(expression: str) -> str:
        value = calculate(expression)
        return error if value is None else value

    return run


def _python(limits: "SandboxConfig | None") -> Tool:
    from distrl.sandbox.limits import SandboxConfig
    from distrl.sandbox.run import Sandbox

    sandbox = Sandbox(limits or SandboxConfig(), setting="the tool python of environment.options.tools")

    def run(program: str) -> str:
        outcome = sandbox.run(program)
        if outcome.ending != "exit":
            return outcome.stdout + f"(ended at the limit of {outcome.ending})"
        return outcome.stdout if outcome.status == 0 else outcome.stdout + outcome.stderr.strip().rpartition("\n")[2]

    return run
