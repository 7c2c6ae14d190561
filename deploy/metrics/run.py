"""All that watches the numbers of a run: the endpoint, the Parquet history, the boards."""

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry

from deploy.live import LiveState
from deploy.metrics.boards import Board, TensorBoard, WeightsAndBiases
from deploy.metrics.endpoint import Endpoint
from deploy.metrics.exporter import Exporter
from deploy.metrics.history import History, readings
from deploy.run_dir import RunDir
from distrl.config import Config
from distrl.errors import RunError


class RunMetrics:
    """Opened beside a run and told of every snapshot.

    Raises:
        RunError: the address is taken, or the run's directory cannot be written to.
    """

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        _check_writable(run_dir)
        self._registry = CollectorRegistry()
        self._exporter = Exporter(self._registry, config.train.steps)
        self._endpoint = Endpoint(config.metrics, self._registry, run_dir.prometheus_targets, config.run.name)
        self._live = LiveState(run_dir)
        self._history = History(run_dir.metrics_history)
        self._boards: list[Board] = [TensorBoard(run_dir.tensorboard)]
        if config.metrics.wandb_project is not None:
            self._boards.append(WeightsAndBiases(config, run_dir.path))

    @property
    def address(self) -> str:
        return self._endpoint.address

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._endpoint.close()
        self._live.close()
        self._history.flush()
        for board in self._boards:
            board.close()

    def update(self, snapshot: Mapping[str, Any]) -> None:
        self._exporter.update(snapshot)
        self._live.update(snapshot)
        steps = [r for r in snapshot["records"] if r["kind"] == "step"]
        if steps:
            values, time_s, step = readings(self._registry), steps[-1]["time_s"], steps[-1]["step"]
            self._history.add(time_s, step, values)
            for board in self._boards:
                board.add(time_s, step, values)


def _check_writable(run_dir: RunDir) -> None:
    for path in (run_dir.metrics_history, run_dir.tensorboard):
        try:
            path.mkdir(exist_ok=True)
            probe = path / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise RunError(
                f"run.dir: the metrics must be writable in {path}, got: {error.strerror}; permit writing there, or "
                "make room"
            ) from error
