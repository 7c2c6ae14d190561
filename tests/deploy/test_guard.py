"""The packages of distrl are found where they belong, or a run is refused."""

from types import ModuleType

import pytest

from deploy import guard
from distrl.errors import RunError


def test_our_own_packages_pass() -> None:
    guard.check_packages()


def test_a_foreign_package_of_the_same_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = ModuleType("deploy")
    foreign.__file__ = "/elsewhere/deploy/__init__.py"
    monkeypatch.setattr(guard, "deploy", foreign)
    with pytest.raises(RunError) as error:
        guard.check_packages()
    message = str(error.value)
    assert "deploy in /elsewhere" in message
    assert message.endswith("; uninstall the distribution that brought the other one")
