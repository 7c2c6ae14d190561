"""The metrics for TensorBoard, always, and for Weights & Biases, where the config names a project."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from deploy.metrics.history import Reading
from distrl.config import Config
from distrl.errors import ConfigError


class Board(Protocol):
    """Takes the readings of a step."""

    def add(self, time_s: float, step: int, values: Iterable[Reading]) -> None: ...
    def close(self) -> None: ...


def tag(name: str, labels: str) -> str:
    """A series as boards name it: distrl_rollouts_total with stage=grading is rollouts_total/grading."""
    values = [pair.partition("=")[2] for pair in labels.split(",") if pair]
    return "/".join([name.removeprefix("distrl_"), *values])


def _charts(values: Iterable[Reading]) -> dict[str, float]:
    """Without the buckets of histograms, which are no curves, and without what is not a number."""
    return {
        tag(name, labels): value for name, labels, value in values if not name.endswith("_bucket") and value == value
    }


class TensorBoard:
    """Event files in a directory that `tensorboard --logdir` reads.

    Written by tensorboardX: Ray Train needs it anyway, and it brings no server as the tensorboard package does.
    """

    def __init__(self, directory: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory))

    def add(self, time_s: float, step: int, values: Iterable[Reading]) -> None:
        for name, value in _charts(values).items():
            self._writer.add_scalar(name, value, step, walltime=time_s)

    def close(self) -> None:
        self._writer.close()


def check_wandb(config: Config) -> None:
    """
    Raises:
        ConfigError: the config names a project, and the package is not there.
    """
    if config.metrics.wandb_project is not None and find_spec("wandb") is None:
        raise ConfigError(
            f"metrics.wandb_project must be empty where the package wandb is not installed, got "
            f"{config.metrics.wandb_project!r}; pip install 'distrl[wandb]', or remove it"
        )


class WeightsAndBiases:
    """One run there per run here; a run that goes on after a stop goes on there.

    The key is wandb's own affair (WANDB_API_KEY or `wandb login`); nothing of it reaches the config.
    """

    def __init__(self, config: Config, directory: Path) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=config.metrics.wandb_project,
            name=config.run.name,
            id=config.run.name,
            resume="allow",
            dir=str(directory),
        )

    def add(self, time_s: float, step: int, values: Iterable[Reading]) -> None:
        self._run.log({**_charts(values), "time_s": time_s}, step=step)

    def close(self) -> None:
        self._run.finish()
