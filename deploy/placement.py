"""GPUs for the processes of a run: what they claim, whether the cluster can give it, and its reservation.

What a device is used for is the engine's matter; here are only numbers that Ray counts. A CPU run claims nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deploy.check import RunPlan
from deploy.nodes import Nodes, learner_room
from deploy.ray_train import RESOURCE
from deploy.roles import GENERATION_STAGES, generation_actors
from distrl.config import Config
from distrl.errors import ConfigError, DeadlineError, RefusedError
from distrl.placement import Claim, Node, check_fits
from distrl.schema import Role

GROUPS = {
    **dict.fromkeys(GENERATION_STAGES.values(), "distrl_generation"),
    "grading": "distrl_grading",
    "environment": "distrl_grading",
    "reference": "distrl_reference",
}
"""By stage: the resource that each of its actors takes one of, where `placement.groups` is set."""

EVEN = 1e-4
"""The smallest share of a GPU that Ray counts."""

LEARNERS_TURN = 0.5
"""What a learner claims that takes turns with generation: for Ray both are there all the time."""


def learner_claims(config: Config, workers: int | None = None) -> list[Claim]:
    """What Ray Train claims for the learner's workers; it makes that reservation itself. See `learner_gpus`.

    Args:
        workers: so many instead of those of the config.
    """
    workers = config.train.workers if workers is None else workers
    gpus = learner_gpus(config)
    return [Claim(f"learner-{i}", gpus) for i in range(workers if gpus else 0)]


def learner_gpus(config: Config) -> float:
    """What one learner worker claims of Ray's GPUs: a whole one where it does not share."""
    if config.train.device != "cuda":
        return 0.0
    return {"shared": config.placement.learner_share, "turns": LEARNERS_TURN}.get(config.placement.mode, 1.0)


def claims(config: Config, plan: RunPlan) -> list[Claim]:
    """What each generation actor claims of Ray's GPUs.

    Actors that take turns with the learner all claim an equal part, whatever share of the memory each may use in its
    turn; half is the learner's where it is on the GPU.
    """
    counts = generation_actors(config, plan.samples)
    return generation_claims(config, [f"{GENERATION_STAGES[role]}-{i}" for role, n in counts.items() for i in range(n)])


def generation_claims(config: Config, names: Sequence[str]) -> list[Claim]:
    """What generation actors of these names claim; see `claims`."""
    match config.placement.mode:
        case "cpu":
            return []
        case "separate":
            return [Claim(name, float(config.generation.tensor_parallel_size)) for name in names]
        case "shared":
            return [Claim(name, config.placement.generation_share) for name in names]
        case "turns":
            part = (1 - learner_gpus(config)) / len(names) // EVEN * EVEN
            return [Claim(name, part) for name in names]


def check_cluster(config: Config, plan: RunPlan) -> None:
    """Refuse a placement that the nodes of the running Ray can never give.

    Raises:
        ConfigError: names the shortfall. Nothing was started.
    """
    nodes = gpu_nodes()
    check_fits(claims(config, plan) + learner_claims(config), nodes)
    if config.placement.mode in ("shared", "turns"):
        # Ray puts shares on whichever device has room: on several they would not share one.
        several = [n for n in nodes if n.gpus > 1]
        if several:
            raise ConfigError(
                f"placement.mode={config.placement.mode} must have nodes with one GPU, {several[0].name} has "
                f"{several[0].gpus:g}; show Ray one of them with CUDA_VISIBLE_DEVICES, or set placement.mode=separate"
            )


def gpu_nodes() -> list[Node]:
    """The nodes of the running Ray that are alive, with their GPUs."""
    return [Node(n["NodeName"], n["Resources"].get("GPU", 0.0)) for n in ray.nodes() if n["Alive"]]


def group_resources(config: Config, stage: str) -> dict[str, float]:
    """What an actor of a stage takes so that it goes to the nodes of its group; nothing where the stage has none."""
    return {GROUPS[stage]: 1.0} if config.placement.groups and stage in GROUPS else {}


def check_learners(config: Config, plan: RunPlan, counts: Mapping[str, int]) -> None:
    """Refuse more learner workers than the nodes of the running Ray have room for.

    Args:
        counts: processes asked for, by stage.
    Raises:
        RefusedError: names the shortfall. ConfigError: there are not enough GPUs.
    """
    if "learners" not in counts:
        return
    wanted, nodes = counts["learners"], [n for n in Nodes().look() if not n.drains]
    there = learner_room(nodes, "cpu")  # of GPUs below, with the names of those who take them
    if wanted > there:
        raise RefusedError(
            f"--learners must be at most {there}, the workers that the {len(nodes)} node(s) have room for (their "
            f"resource {RESOURCE}), got {wanted}, {wanted - there} too many; ask for fewer, or add nodes"
        )
    check_fits(
        claims(config, plan) + learner_claims(config, wanted),
        [Node(n.name, n.resources.get("GPU", 0.0)) for n in nodes],
    )


@dataclass(slots=True)
class Reservation:
    """GPUs that are kept for the generation actors of a run; empty for a CPU run."""

    group: PlacementGroup | None = None
    gpus: Mapping[str, float] = field(default_factory=dict)
    """Of each actor, by stage."""

    def options(self, stage: str) -> dict[str, Any]:
        """Options of an actor of this stage. One that takes the place of another gets what that has left."""
        if self.group is None or stage not in self.gpus:
            return {}
        return {
            "num_gpus": self.gpus[stage],
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=-1),
        }

    def release(self) -> None:
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None


def reserve(config: Config, plan: RunPlan) -> Reservation:
    """Keeps the GPUs of all generation actors at once: either all of them, or none.

    Raises:
        ConfigError: the cluster can never give them. DeadlineError: others hold them for longer than
            `limits.start_timeout_s`.
    """
    check_cluster(config, plan)
    wanted = claims(config, plan)
    if not wanted:
        return Reservation()
    place = group_resources(config, GENERATION_STAGES[Role.POLICY])  # learners' nodes have GPUs, too
    group = placement_group([{"GPU": claim.gpus, **place} for claim in wanted], strategy="PACK")
    if not group.wait(config.limits.start_timeout_s):
        free = ray.available_resources().get("GPU", 0.0)
        remove_placement_group(group)
        total = sum(claim.gpus for claim in wanted)
        raise DeadlineError(
            f"placement: {total:g} GPUs for {len(wanted)} generation actors must be free within "
            f"limits.start_timeout_s = {config.limits.start_timeout_s:g} s, {free:g} are; wait for the other job, or "
            "lower the number of actors"
        )
    return Reservation(group, {claim.name.rpartition("-")[0]: claim.gpus for claim in wanted})
