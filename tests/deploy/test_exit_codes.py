"""What a script learns from the exit status alone."""

import pickle

import pytest

from deploy import exit_codes
from deploy.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_REFUSED, exit_code
from distrl import errors
from distrl.errors import DistrlError
from tests.deploy.commands import call


def all_errors(base: type[DistrlError] = DistrlError) -> list[type[DistrlError]]:
    return [base, *(error for child in base.__subclasses__() for error in all_errors(child))]


def test_the_statuses_are_those_that_scripts_rely_on() -> None:
    assert (EXIT_OK, EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED) == (0, 1, 2, 130)
    named = {name for name in vars(exit_codes) if name.startswith("EXIT_")}
    assert named == {"EXIT_OK", "EXIT_FAILED", "EXIT_REFUSED", "EXIT_INTERRUPTED"}


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_only_what_started_nothing_is_refused(kind: type[DistrlError]) -> None:
    refused = kind in (errors.ConfigError, errors.DataError, errors.RefusedError)
    assert exit_code(kind("what is wrong")) == (EXIT_REFUSED if refused else EXIT_FAILED)
    assert str(pickle.loads(pickle.dumps(kind("what is wrong")))) == "what is wrong"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], EXIT_OK), (["nothing"], EXIT_REFUSED), (["train"], EXIT_REFUSED), (["train", "--x"], EXIT_REFUSED)],
)
def test_a_command_line_that_cannot_be_read_is_refused(
    arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == status
    assert bool(capsys.readouterr().err) == (status != EXIT_OK)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), EXIT_INTERRUPTED, "interrupted\n"),
        (errors.StageError("the grader is broken"), EXIT_FAILED, "StageError: the grader is broken\n"),
        (errors.RefusedError("it exists"), EXIT_REFUSED, "RefusedError: it exists\n"),
    ],
)
def test_what_ends_a_command_is_told_in_one_line(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("deploy.quickstart.run_quickstart", fail)
    assert call(monkeypatch, "quickstart") == status
    assert capsys.readouterr().err == said
