"""The learner under Ray Train: its connection to the run, its worker function, and the group as the run sees it."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from actors.calls import unwrap
from deploy.checkpoints import local_checkpoint
from deploy.offering import OfferingPublisher, Source
from deploy.publisher import Publisher
from deploy.remote.located import whereabouts
from deploy.run_dir import RunDir
from deploy.run_storage import sending, storage_at
from distrl.config import Config
from distrl.errors import DeadlineError, DistrlError, RunError
from distrl.messages import BatchGrant, LearnerStart, Manifest, PublishAgain, StepReport, TicketGrant, Whereabouts
from learners.checkpoint import TrainState
from learners.logp_check import LogpCheckSettings
from learners.loop import train
from learners.parallel import ParallelSettings
from learners.trainer import LoopSettings, Stages, Trainer
from learners.world import World

if TYPE_CHECKING:
    from torch import Tensor

CHECK_S = 1.0
"""Seconds between two looks at a publication while a batch is waited for."""

OUTAGE_POLL_S = 0.2
"""Seconds between two calls to a process that is being started again."""


class RayLink:
    """The training loop's calls to the coordinator and the policy store, and its reading of rollouts.

    Each has the deadline limits.publish_timeout_s. Calls that meet a process which is being started again are made
    again, for limits.outage_s at most: all of them may be told twice.

    Waiting for a batch has no deadline: how long sampling may take is bounded by the stages' own timeouts, and the
    coordinator's answer ends when the run fails. A publication may be under way in another thread meanwhile.
    """

    def __init__(
        self,
        coordinator: Any,
        store: Any,
        timeout_s: float,
        outage_s: float,
        source: Callable[[], Source] | None = None,
    ) -> None:
        """
        Args:
            source: makes what offers published weights beside the store, where something does; called once, by the
                worker that publishes.
        """
        self._coordinator = coordinator
        self._publisher = Publisher(store, timeout_s)
        self._source = source
        self._offering: OfferingPublisher | None = None
        self._timeout_s = timeout_s
        self._outage_s = outage_s
        self._session = 0

    def begin(self, workers: Sequence[Whereabouts]) -> LearnerStart:
        """A group of these processes begins, this one is the first; the checkpoint that it goes on from."""
        start: LearnerStart = self._get(
            lambda: self._coordinator.learner_begins.remote(workers[0], tuple(workers)), "learner_begins"
        )
        return start

    def sit(self, session: int) -> None:
        """What this process says from now on it says in this session."""
        self._session = session

    def failed(self, cause: str) -> None:
        """The run cannot go on with this learner or another one."""
        self._get(lambda: self._coordinator.learner_failed.remote(cause, self._session or None), "learner_failed")

    def next_batch(
        self, step: int, check: Callable[[], None]
    ) -> tuple[Sequence[Stages], Mapping[int, int | None]] | PublishAgain | None:
        def ask() -> Any:
            asked = self._coordinator.next_batch.remote(step, self._session)
            while not ray.wait([asked], timeout=CHECK_S)[0]:
                check()
            return asked

        while True:
            grant: BatchGrant | PublishAgain | None = self._get(ask, "next_batch", None)
            if grant is None or isinstance(grant, PublishAgain):
                return grant
            try:
                tickets = [self._read(ticket) for ticket in grant.tickets]
            except ray.exceptions.ObjectLostError:
                continue  # with the coordinator that owned it or the node that held it; the journal has it
            return tickets, {t.ticket_id: t.staleness for t in grant.tickets}

    def _read(self, ticket: TicketGrant) -> Stages:
        refs = [r for r in (ticket.generation, ticket.grading, ticket.reference) if r is not None]
        values = self._get(lambda: refs, f"rollouts of ticket {ticket.ticket_id}")
        return values[0], values[1], values[2] if ticket.reference is not None else None

    def trained(self, report: StepReport, staleness: Mapping[int, int | None]) -> int:
        told = dict(staleness)
        return int(self._get(lambda: self._coordinator.trained.remote(report, told, self._session), "trained"))

    def restored(self, state: TrainState) -> int:
        return int(self._get(lambda: self._coordinator.restored.remote(state.step, self._session), "restored"))

    def publish(self, manifest: Manifest, tensors: "Mapping[str, Tensor]", *, again: bool = False) -> None:
        if self._source is None:
            self._publisher.publish(manifest, tensors, whole=again)
        else:
            if self._offering is None:
                self._offering = OfferingPublisher(self._publisher, self._source())
            self._offering.publish(manifest, tensors, again=again)
        self._get(
            lambda: self._coordinator.published.remote(
                manifest.version, manifest.step, manifest.sha256, manifest.weights, self._session
            ),
            f"published, of {manifest.weights} version {manifest.version},",
        )

    def finish(self) -> None:
        """Returns when the policy store has everything that was published."""
        if self._offering is not None:
            self._offering.finish()

    def close(self) -> None:
        if self._offering is not None:
            self._offering.close()

    def commit_checkpoint(self, location: str, state: TrainState, sha256: str) -> None:
        self._get(
            lambda: self._coordinator.commit_checkpoint.remote(
                location, state.step, state.version, sha256, self._session
            ),
            "commit_checkpoint",
        )

    def _get(self, call: Callable[[], Any], what: str, timeout_s: float | None = -1.0) -> Any:
        timeout_s = self._timeout_s if timeout_s == -1.0 else timeout_s
        away_since: float | None = None
        while True:
            try:
                return ray.get(call(), timeout=timeout_s)
            except ray.exceptions.GetTimeoutError:
                raise DeadlineError(
                    f"the learner's call {what} must be answered within limits.publish_timeout_s = {timeout_s:g} s, "
                    "got nothing; look at the coordinator's log"
                ) from None
            except ray.exceptions.RayTaskError as error:
                raise unwrap(error, what) from error
            except ray.exceptions.ActorUnavailableError as error:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > self._outage_s:
                    raise DeadlineError(
                        f"the learner's call {what} must be answered within limits.outage_s = {self._outage_s:g} s of "
                        "the first attempt, the process it goes to is still away"
                    ) from error
                time.sleep(OUTAGE_POLL_S)
            except ray.exceptions.RayActorError as error:
                raise RunError(f"the learner's call {what} failed: the process it went to is gone") from error


def loop_settings(config: Config, run_dir: RunDir) -> LoopSettings:
    """The training loop's part of the config."""
    import torch

    from deploy.check import optimizer_settings

    t = config.train
    storage = storage_at(config.storage.uri, run_dir)
    return LoopSettings(
        steps=t.steps,
        temperature=config.rollout.temperature,
        micro_batch_tokens=t.micro_batch_tokens,
        checkpoint_every_steps=t.checkpoint_every_steps,
        checkpoints=storage.checkpoints.local or sending(run_dir),
        storage=storage.checkpoints if storage.checkpoints.local is None else None,
        optimizer=optimizer_settings(config),
        layout=t.layout,
        parallel=ParallelSettings(t.parallel, getattr(torch, t.dtype), t.activation_checkpointing),
        skipped_in_a_row=config.limits.skipped_steps_in_a_row,
        publish=config.lora.publish,
        # With a bound of 0 the next batch is sampled from these weights; a run that only replays waits for nobody.
        publish_beside=t.max_staleness > 0 or config.offline,
        takes_turns=config.placement.mode == "turns" and t.device == "cuda",
        logp_check=LogpCheckSettings(
            # What the fake engine records is no model's, and what another run recorded none of this run's.
            rollouts=0 if config.generation.engine == "fake" or config.offline else t.logp_check_rollouts,
            bound=t.logp_mismatch_bound,
            max_staleness=t.max_staleness,
            update_mode=config.generation.update_mode,
            temperature=config.rollout.temperature,
        ),
    )


def make_trainer(config: Config, run_dir: RunDir, world: World) -> Trainer:
    """A worker's trainer, with the model that the run begins from."""
    import torch

    from deploy.check import build_recipe
    from distrl.lora import LoraSettings, add_adapters
    from distrl.models import load_model, load_tokenizer

    model: Any = load_model(config.model.path, torch.float32)
    lora = config.lora
    if lora.rank:
        add_adapters(model, LoraSettings(lora.rank, lora.alpha, lora.targets), config.run.seed)
    tokenizer = load_tokenizer(config.model.path)
    settings = loop_settings(config, run_dir)
    if not settings.takes_turns:  # else generation may be on the device now
        model = model.to(world.device)
    return Trainer(model, tokenizer, build_recipe(config), settings, world)


def run_worker(arguments: Mapping[str, Any]) -> None:
    """What each Ray Train worker runs, also in place of one that died."""
    config: Config = arguments["config"]
    limits = config.limits
    link = RayLink(
        arguments["coordinator"],
        arguments["store"],
        limits.publish_timeout_s,
        limits.outage_s,
        None if config.generation.transport == "store" else partial(transfer_source, config),
    )
    try:
        _learn(config, arguments["run_dir"], link)
        link.finish()
    except DistrlError as error:
        # Known to be beyond repair. An end without an exception: Ray Train would only start the worker again.
        link.failed(f"{type(error).__name__}: {error}")
    finally:
        link.close()


def transfer_source(config: Config) -> Source:
    """What offers this process's weights by `generation.transport`."""
    from actors.transfer.planes import known_plane
    from actors.transfer.sender import TransferSource

    host = ray.util.get_node_ip_address()
    plane = known_plane(config.generation.transport)
    return TransferSource(plane, host, whereabouts().node, config.limits.transport_timeout_s)


def _learn(config: Config, run_dir: RunDir, link: RayLink) -> None:
    import torch
    from ray import train as ray_train
    from ray.train.torch import get_device

    torch.set_num_threads(config.run.threads_per_process)
    context = ray_train.get_context()
    world = World.join(context.get_world_rank(), context.get_world_size(), get_device())
    if config.placement.mode == "shared" and world.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(config.placement.learner_share, world.device)
    trainer = make_trainer(config, run_dir, world)

    def report(metrics: Mapping[str, float]) -> None:
        ray_train.report(dict(metrics))

    start = world.from_first(partial(link.begin, world.gather(whereabouts())))
    link.sit(start.session)
    resume = None
    if start.checkpoint is not None:
        with local_checkpoint(storage_at(config.storage.uri, run_dir), start.checkpoint) as directory:
            resume = trainer.restore(directory)
    elif start.publish:
        resume = TrainState(step=0, version=0)  # the weights that the run began with, under a new version
    train(trainer, loop_settings(config, run_dir), link, world, resume, report, republish=start.publish)
