"""Puts a run together: CLI, wiring of Ray actors, progress, quickstart.

From Python, `train` does what `distrl train` does:

    from deploy import train

    summary = train("mine.yaml", ["train.steps=20"])
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrl.config import Config

__all__ = ["train"]


def train(
    config: "Config | Mapping[str, Any] | Path | str", overrides: Sequence[str] = (), *, quiet: bool = False
) -> dict[str, Any]:
    """Trains as a config says and returns when the run is done.

    Args:
        config: path of a YAML file, its content as nested mappings, or a `Config`. Relative paths in it count from
            the current directory.
        overrides: `section.key=value`, as on the command line; later ones win.
        quiet: shows no progress; else it is that of the command line, on the standard output.
    Returns:
        The summary, which is also in the run's `summary.json`.
    Raises:
        ConfigError, DataError: the config cannot be run; nothing was started.
        RefusedError: the run's directory exists; nothing was started.
        RunError: the run failed; the message has the cause.
    """
    # Imported here: torch and Ray take seconds, and `import deploy` should not.
    from rich.console import Console

    from deploy.guard import check_packages
    from deploy.progress import Silent, Terminal
    from deploy.run import run_training
    from distrl.config import Config, load_config, make_config

    check_packages()
    match config:
        case str() | Path():
            made = load_config(Path(config), overrides)
        case Config():
            made = make_config(config.model_dump(), overrides)
        case _:
            made = make_config(config, overrides)
    return run_training(made, Silent() if quiet else Terminal(Console(), made.train.steps, made.run.name))
