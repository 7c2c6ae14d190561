"""Calls the command line inside the test's process."""

import sys

import pytest

from deploy import cli


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs a command; its exit status."""
    monkeypatch.setattr(sys, "argv", ["distrl", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)
