"""The learner's workers on Ray Train, as the run sees them."""

import threading
from typing import Any

import ray

from deploy.placement import learner_gpus
from deploy.ray_train import RESOURCE, worker_main
from deploy.run_dir import RunDir
from deploy.run_storage import storage_at
from distrl.config import Config
from distrl.errors import RunError
from learners.group import GroupStatus


class RayTrainGroup:
    """The workers, on Ray Train V2; `fit` runs in a thread, so that the terminal stays alive.

    A worker that dies is started again by Ray Train, and with it the whole group, as often as it takes: the supervisor
    counts and ends the run when it is too often. An elastic group (`train.max_workers`) fails instead, so that the
    next one can be of another size. What the workers go on from the coordinator says, not Ray Train.
    """

    def __init__(self, config: Config, run_dir: RunDir, coordinator: Any, store: Any) -> None:
        self._config = config
        self._run_dir = run_dir
        self._arguments = {
            "config": config,
            "run_dir": run_dir,
            "coordinator": coordinator,
            "store": store,
        }
        self._thread: threading.Thread | None = None
        self._status = GroupStatus.STARTING
        self._error: BaseException | None = None

    def start(self, workers: int) -> None:
        self._status, self._error = GroupStatus.STARTING, None
        self._thread = threading.Thread(target=self._fit, args=(workers,), name="learner-group", daemon=True)
        self._thread.start()

    def status(self) -> GroupStatus:
        return self._status

    def error(self) -> BaseException | None:
        return self._error

    def stop(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _fit(self, workers: int) -> None:
        # Imported here, beside the start of the other actors: it takes seconds.
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        # Ray Train keeps its own state where every machine of the run sees it.
        filesystem, path = (storage_at(self._config.storage.uri, self._run_dir).folder / "ray_train").filesystem
        gpus = learner_gpus(self._config)
        again = -1 if self._config.train.max_workers is None else 0
        try:
            trainer = TorchTrainer(
                worker_main,
                train_loop_config=self._arguments,
                scaling_config=ScalingConfig(
                    num_workers=workers,
                    use_gpu=bool(gpus),
                    resources_per_worker={"CPU": 0, RESOURCE: 1, **({"GPU": gpus} if gpus else {})},
                ),
                # Small messages and checkpoints stay on the CPU.
                torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
                run_config=RunConfig(
                    name="learner",
                    storage_path=path,
                    storage_filesystem=filesystem,
                    failure_config=FailureConfig(max_failures=again, controller_failure_limit=again),  # type: ignore[call-arg]
                ),
            )
            self._status = GroupStatus.RUNNING
            trainer.fit()
            self._status = GroupStatus.FINISHED
        except BaseException as error:  # noqa: BLE001  (kept for the run, which raises it in its own thread)
            self._error = RunError(f"the learner failed: {_cause(error)}")
            self._status = GroupStatus.FAILED


def _cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    while isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    return f"{type(error).__name__}: {error}"
