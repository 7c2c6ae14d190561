"""docs/cli.md and the help texts say what the commands take."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from deploy import exit_codes
from deploy.cli import app
from tests.deploy.commands import call

PAGE = (Path(__file__).parents[2] / "docs/cli.md").read_text()
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands
EXAMPLES = re.findall(r"^    distrl (.+)$", PAGE, re.MULTILINE)


def section(command: str) -> str:
    found = re.search(rf"^## {command}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/cli.md must have a section '## {command}'"
    return found[1]


def example(command: Any) -> str:
    """The example in a command's help."""
    return " ".join(command.help.partition("Example: distrl ")[2].partition("\n\n")[0].split())


def parse(line: str) -> Any:
    """Reads the arguments of a line, as a shell would give them, without running the command."""
    name, *arguments = shlex.split(line.partition(" > ")[0])
    return COMMANDS[name].make_context(name, arguments)


def test_the_page_has_every_command_and_no_other() -> None:
    assert set(re.findall(r"^## (\S+)$", PAGE, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_section_of_a_command_has_an_example_and_its_options(name: str) -> None:
    text = section(name)
    assert f"\n    distrl {name} " in text or text.strip().startswith(f"distrl {name}")
    options = [option for parameter in COMMANDS[name].params for option in parameter.opts if option.startswith("--")]
    assert [
        option for option in options if option not in (*text.split(), "--json", "--help") and option not in text
    ] == []


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_of_the_page_is_a_command_line_that_is_understood(line: str) -> None:
    parse(line)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_shows_an_example_that_is_understood(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, name, "--help") == 0
    assert f"Example: distrl {name} " in capsys.readouterr().out
    assert parse(example(COMMANDS[name])).info_name == name


def test_the_page_lists_the_exit_statuses() -> None:
    listed = {int(status) for status in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    assert listed == {value for name, value in vars(exit_codes).items() if name.startswith("EXIT_")}


def test_json_is_an_option_of_every_command_that_answers_with_data() -> None:
    options = {name: {option for p in command.params for option in p.opts} for name, command in COMMANDS.items()}
    assert {name for name, known in options.items() if "--json" in known} >= {"eval", "export", "recipes"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_that_is_wider_than_the_source_is_not_broken_where_the_source_is(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    assert call(monkeypatch, name, "--help") == 0
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for paragraph in COMMANDS[name].help.split("\n\n"):
        assert " ".join(paragraph.split()) in printed
