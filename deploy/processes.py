"""The processes of a run through Ray: started, asked whether they live, ended."""

import os
from typing import Any, Protocol

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.check import RunPlan
from deploy.placement import Reservation, group_resources
from deploy.remote.coordinator import CoordinatorActor
from deploy.remote.environment import EnvironmentActor
from deploy.remote.generation import GenerationActor
from deploy.remote.grading import GradingActor
from deploy.remote.journal import JournalActor
from deploy.remote.policy_store import PolicyStoreActor
from deploy.remote.reference import ReferenceActor
from deploy.remote.replay import ReplayActor
from deploy.roles import weights_of_stage
from deploy.run_dir import RunDir
from deploy.run_storage import storage_at
from distrl.config import Config
from distrl.errors import RunError
from distrl.messages import Whereabouts

UNIQUE = ("policy-store", "journal", "coordinator")
"""Processes that others hold a handle of: Ray starts them again under the same handle."""


class ProcessGoneError(Exception):
    """The process has ended and stays so; the message says why."""


class Processes(Protocol):
    """What the supervisor needs of the processes."""

    def start(self, stage: str, name: str) -> Any:
        """A handle of a new process of a stage; returns at once."""
        ...

    def unique(self) -> dict[str, Any]:
        """Handles of the processes of which there is one each."""
        ...

    def stays(self, stage: str) -> bool:
        """Whether processes of a stage cannot be started elsewhere, because their GPUs were reserved at the start."""
        ...

    def probe(self, handle: Any) -> Any:
        """Asks a process where it is; see `answer`."""
        ...

    def answer(self, question: Any) -> Whereabouts | None:
        """The answer, None while there is none.

        Raises:
            ProcessGoneError: it has ended for good. InterruptedError: it ended and is being started again.
        """
        ...

    def end(self, handle: Any, restart: bool = False) -> None:
        """Kills a process; with `restart` Ray starts it again."""
        ...


class RayProcesses:
    """Processes as Ray actors.

    Members of a pool have `max_restarts=0` and are replaced by the supervisor under a new handle: what is known of a
    dead process, its policy version above all, is then never taken for its successor's, and their death is known at
    once. The unique ones have `max_restarts=-1`, because the learner, the stages and the driver hold their handles.
    """

    def __init__(self, config: Config, run_dir: RunDir, plan: RunPlan, reservation: Reservation) -> None:
        self._config = config
        self._reservation = reservation
        self._run_dir = run_dir
        self._plan = plan
        self.store = self._make(PolicyStoreActor, self._here())
        # Generation holds their handles. One that starts again has no episodes: those that it had are sampled anew.
        count = config.environment.actors if config.environment.name is not None and config.samples else 0
        self.environments = [
            self._make(EnvironmentActor, {"max_restarts": -1, **self._group("environment")}, config, os.getcwd())
            for _ in range(count)
        ]
        journal = storage_at(config.storage.uri, run_dir).journal
        self.journal = self._make(JournalActor, self._here(), journal, config.limits.journal_bytes)
        self.coordinator = self._make(
            CoordinatorActor,
            self._here(),
            config,
            run_dir,
            self.journal,
            plan.scores_reference,
            plan.left_out | plan.values.unsolved,
            plan.samples,
            None if plan.replay is None else plan.replay.ledger,
        )

    def _here(self) -> dict[str, Any]:
        """On the driver's node, where the run's directory is, and which is not taken away as others may be."""
        node = ray.get_runtime_context().get_node_id()
        return {"max_restarts": -1, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}

    def _group(self, stage: str) -> dict[str, Any]:
        """On the nodes of the stage's group, where there are such."""
        return {"resources": group_resources(self._config, stage)}

    @staticmethod
    def _make(actor: type, options: dict[str, Any], *arguments: Any) -> Any:
        made: Any = ray.remote(actor).options(num_cpus=0, max_task_retries=0, **options)
        return made.remote(*arguments)

    def unique(self) -> dict[str, Any]:
        environments = {f"environment-{i}": handle for i, handle in enumerate(self.environments)}
        return {
            "policy-store": self.store,
            "journal": self.journal,
            "coordinator": self.coordinator,
            **environments,
        }

    def start(self, stage: str, name: str) -> Any:
        options = {
            "max_restarts": 0,
            "scheduling_strategy": "SPREAD",
            **self._group(stage),
            **self._reservation.options(stage),
        }
        weights = weights_of_stage(self._config, self._plan.samples, stage)
        if weights is not None:
            return self._make(GenerationActor, options, self._config, name, self.store, weights, self.environments)
        match stage:
            case "grading":
                arguments = (self._config, self._plan.graders, os.getcwd(), self._plan.opponents)
                return self._make(GradingActor, options, *arguments)
            case "reference":
                return self._make(ReferenceActor, options, self._config)
            case "replay":
                assert self._plan.replay is not None
                # The recording may lie on this node's disk.
                options = {**self._here(), "max_restarts": 0}
                return self._make(ReplayActor, options, self._plan.replay.folder, self._plan.replay.vocabulary)
        raise RunError(f"a process must be one of a stage that the run has, got {stage}")

    def stays(self, stage: str) -> bool:
        return bool(self._reservation.options(stage))

    def probe(self, handle: Any) -> Any:
        return handle.whereabouts.remote()

    def answer(self, question: Any) -> Whereabouts | None:
        try:
            where: Whereabouts = ray.get(question, timeout=0)
        except GetTimeoutError:
            return None
        except ActorUnavailableError as error:
            raise InterruptedError(_last_line(error)) from error
        except (ActorDiedError, RayActorError) as error:
            raise ProcessGoneError(_last_line(error)) from error
        except RayTaskError as error:
            raise ProcessGoneError(f"{type(error.cause).__name__}: {error.cause}") from error
        return where

    def end(self, handle: Any, restart: bool = False) -> None:
        ray.kill(handle, no_restart=not restart)


def _last_line(error: BaseException) -> str:
    """Of a constructor that failed this is the error itself; of a process that was killed, how."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
