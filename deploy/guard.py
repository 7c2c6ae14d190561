"""Refuses to run when one of the four packages is somebody else's."""

from pathlib import Path

import actors
import deploy
import distrl
import learners
from distrl.errors import RunError


def check_packages() -> None:
    """`actors`, `deploy` and `learners` are common names: another distribution may have installed one over ours.

    Raises:
        RunError: the packages do not share one parent folder; names each folder.
    """
    folders = {p.__name__: Path(str(p.__file__)).parent.parent for p in (distrl, actors, learners, deploy)}
    if len(set(folders.values())) > 1:
        places = ", ".join(f"{name} in {folder}" for name, folder in folders.items())
        raise RunError(
            f"the packages of distrl must lie in one folder, got {places}; uninstall the distribution that brought "
            "the other one"
        )
