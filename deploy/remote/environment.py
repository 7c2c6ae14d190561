"""The environment actor."""

from actors.environments import EnvironmentHost
from deploy.remote.located import Located
from distrl.config import Config
from distrl.environments.registry import environment_factory
from distrl.graders.registry import importable_from


class EnvironmentActor(EnvironmentHost, Located):
    """`EnvironmentHost` with the run's environment.

    Args:
        folder: where the run was started; an environment of the user's own may be a module there.
    """

    def __init__(self, config: Config, folder: str) -> None:
        importable_from(folder)
        super().__init__(environment_factory(config))
