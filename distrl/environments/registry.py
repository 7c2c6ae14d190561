"""Environments by name."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from distrl.environments.protocol import Environment
from distrl.errors import ConfigError
from distrl.graders.registry import import_target

if TYPE_CHECKING:
    from distrl.config import Config

KNOWN = {
    "tools": "distrl.environments.tools:Tools",
    "reasoning_gym": "distrl.environments.adapters:ReasoningGym",
    "verifiers": "distrl.environments.adapters:Verifiers",
}


def environment_factory(config: "Config") -> Callable[[], Environment]:
    """Makes environments of the kind that the config names.

    Raises:
        ConfigError: there is no such environment, or its options do not suit it.
    """
    name = str(config.environment.name)
    if name not in KNOWN and ":" not in name:
        raise ConfigError(
            f"environment.name must be one of {', '.join(KNOWN)} or module:Class, got {name!r}; "
            "name the class as my_package.my_module:MyEnvironment"
        )
    found: Any = import_target(KNOWN.get(name, name), "environment.name")
    options: Mapping[str, Any] = config.environment.options
    given = {"sandbox": config.sandbox} if "sandbox" in inspect.signature(found).parameters else {}

    def make() -> Environment:
        environment: Environment = found(**given, **options)
        return environment

    try:
        inspect.signature(found).bind(**given, **options)
    except TypeError as error:
        raise ConfigError(
            f"environment.options must be the arguments of {name}, got {dict(options)!r}: {error}; correct them"
        ) from error
    return make
