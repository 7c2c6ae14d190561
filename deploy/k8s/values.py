"""What a cluster needs to know beside the run's config; `--set key=value` on the command line."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distrl.config import Config
from distrl.errors import ConfigError

Overlay = Literal["cpu", "gpu"]
OVERLAYS: tuple[Overlay, ...] = ("cpu", "gpu")
RAY_VERSION = "2.60.0"
GRACE_MARGIN_S = 15
"""Ray needs some seconds beside its drain to end its processes."""


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class GroupValues(_Values):
    """One group of equal pods."""

    replicas: int = Field(1, ge=1)
    """Pods; the least where `max_replicas` is more."""
    max_replicas: int | None = Field(None, ge=1)
    """Most pods: the autoscaler adds what the run asks for; empty is `replicas`."""
    cpu: int = Field(2, ge=1)
    memory_gib: int = Field(8, ge=2)
    gpus: int = Field(0, ge=0)
    spot: bool = False
    """On nodes that may be taken away."""

    @property
    def most(self) -> int:
        return self.replicas if self.max_replicas is None else self.max_replicas

    @model_validator(mode="after")
    def _least_is_not_above_most(self) -> Self:
        if self.most < self.replicas:
            raise ValueError(f"max_replicas must be >= replicas ({self.replicas}), got {self.max_replicas}")
        return self


class KubernetesValues(_Values):
    """The keys of `--set`."""

    namespace: str = "distrl"
    image: str = Field("", pattern=r"^$|^[^\s]+(:[^\s:@/]+|@sha256:[0-9a-f]{64})$")
    """Image of all pods, with a tag or digest."""
    gpu_image: str = Field("", pattern=r"^$|^[^\s]+(:[^\s:@/]+|@sha256:[0-9a-f]{64})$")
    """Image of pods with GPUs; empty takes `image`."""
    head: GroupValues = GroupValues(cpu=4, memory_gib=16)
    learners: GroupValues = GroupValues()
    generation: GroupValues = GroupValues()
    grading: GroupValues = GroupValues()
    reference: GroupValues = GroupValues()
    run_storage_class: str = ""
    """Of the block volume of run.dir; empty is the cluster's default."""
    run_gib: int = Field(50, ge=1)
    shared_storage_class: str = ""
    """Of the volume that all pods share (ReadWriteMany), for models, data, journal and checkpoints."""
    shared_gib: int = Field(500, ge=1)
    auth_secret: str = "distrl-ray-auth"
    """Secret whose key auth_token is the token of Ray's processes; made by you."""
    environment_secret: str = ""
    """Secret whose keys become environment variables of the head and the learners, such as WANDB_API_KEY or
    AWS_ACCESS_KEY_ID; empty is none."""
    priority: int = Field(1000, ge=0)
    backoff_limit: int = Field(20, ge=1)
    """How often a new cluster goes on with the run."""
    drain_s: int = Field(45, ge=1)
    """Seconds that Ray gives its tasks when a pod is taken away."""
    grace_s: int = Field(90, ge=1)
    """Seconds until Kubernetes kills the pod; more than drain_s + 15."""
    spot_key: str = "distrl.dev/spot"
    """Label and taint of spot nodes."""
    operator_namespace: str = "kuberay-system"
    monitoring_namespace: str = "monitoring"
    api_server_cidr: str = "0.0.0.0/0"
    """Where the API server is, for the autoscaler; narrow it to your cluster's."""
    object_storage_cidr: str = ""
    """Where object storage is, port 443; empty lets no pod out."""
    metrics_port: int = Field(9464, ge=1, le=65535)

    @model_validator(mode="after")
    def _grace_is_longer_than_the_drain(self) -> Self:
        if self.grace_s <= self.drain_s + GRACE_MARGIN_S:
            raise ValueError(
                f"grace_s must be more than drain_s + {GRACE_MARGIN_S} ({self.drain_s + GRACE_MARGIN_S}), got "
                f"{self.grace_s}; otherwise pods are killed before Ray has drained them"
            )
        return self


_GPU: Mapping[str, Any] = {
    "learners": {"cpu": 32, "memory_gib": 256, "gpus": 8},
    "generation": {"cpu": 16, "memory_gib": 128, "gpus": 1, "spot": True},
    "grading": {"cpu": 8, "memory_gib": 32},
    "reference": {"cpu": 16, "memory_gib": 64},
    "run_gib": 200,
    "shared_gib": 2000,
}


def make_values(overlay: str, settings: Iterable[str], config: Config) -> KubernetesValues:
    """The overlay's values with the run's own numbers and `key=value` settings, the last of which wins.

    Raises:
        ConfigError: unknown overlay or key, a value out of range, or GPUs that do not divide.
    """
    if overlay not in OVERLAYS:
        raise ConfigError(f"--overlay must be one of {', '.join(OVERLAYS)}, got {overlay!r}")
    merged: dict[str, Any] = (
        {k: dict(v) if isinstance(v, Mapping) else v for k, v in _GPU.items()} if overlay == "gpu" else {}
    )
    asked: set[str] = set()
    for setting in settings:
        asked.add(_apply(merged, setting))
    try:
        values = KubernetesValues.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from error
    if not values.image:
        raise ConfigError(
            "--set image=... is required: the image of the pods, with its tag, such as "
            "--set image=registry.example/distrl:0.1.0-cpu; deploy/docker/Dockerfile builds it"
        )
    for name in ("image", "gpu_image"):
        if getattr(values, name).endswith(":latest"):
            raise ConfigError(
                f"--set {name} must not be :latest, pods of one run must have one version, got "
                f"{getattr(values, name)!r}; name a version or a digest"
            )
    return _sized(values, config, asked)


def _sized(values: KubernetesValues, config: Config, asked: set[str]) -> KubernetesValues:
    """Pods from the counts of the config, where `--set` does not say them.

    Raises:
        ConfigError: the GPUs of a pod do not divide into what the config wants to put there.
    """
    workers = config.train.workers
    per_actor = config.generation.tensor_parallel_size
    learners, generation = values.learners, values.generation
    _check_gpus_are_used(values, config)
    if learners.gpus and "learners.replicas" not in asked:
        pods, rest = divmod(workers, min(learners.gpus, workers))
        if rest:
            raise ConfigError(
                f"train.workers must be a multiple of learners.gpus ({learners.gpus}), a worker has one "
                f"GPU and pods are equal, got {workers}; change --set learners.gpus"
            )
        learners = learners.model_copy(update={"replicas": pods, "gpus": min(learners.gpus, workers)})
    if generation.gpus:
        if generation.gpus % per_actor:
            raise ConfigError(
                f"generation.gpus must be a multiple of generation.tensor_parallel_size ({per_actor}), "
                f"the processes of one actor are in one pod, got {generation.gpus}; change --set "
                "generation.gpus"
            )
        if "generation.replicas" not in asked:
            actors = processes("generation", config)
            pods, rest = divmod(actors * per_actor, generation.gpus)
            if rest:
                raise ConfigError(
                    f"generation.actors times their GPUs must be a multiple of generation.gpus "
                    f"({generation.gpus}), pods are equal, got {actors} x {per_actor}; "
                    "change --set generation.gpus"
                )
            generation = generation.model_copy(update={"replicas": pods})
    if generation.most < generation.replicas:
        raise ConfigError(
            f"generation.max_replicas must be >= the {generation.replicas} pods that generation.actors "
            f"need, got {generation.most}"
        )
    return values.model_copy(update={"learners": learners, "generation": generation})


def _check_gpus_are_used(values: KubernetesValues, config: Config) -> None:
    """Pods have GPUs where, and only where, the run would use them."""
    wanted = {"learners": config.train.device == "cuda", "generation": config.placement.mode != "cpu"}
    keys = {"learners": "train.device=cuda", "generation": "placement.mode=separate"}
    for name, uses in wanted.items():
        gpus = getattr(values, name).gpus
        if gpus and not uses:
            raise ConfigError(
                f"{name}.gpus must be 0 where the run uses none there, got {gpus}: they would be idle; set "
                f"{keys[name]} in the config, or --set {name}.gpus=0"
            )
        if uses and not gpus:
            raise ConfigError(
                f"{name}.gpus must be at least 1, the config has {keys[name]}, got 0; choose --overlay gpu, or --set "
                f"{name}.gpus"
            )
    if config.placement.mode not in ("cpu", "separate"):
        raise ConfigError(
            f"placement.mode must be cpu or separate on Kubernetes, learners and generation have pods of their own, "
            f"got {config.placement.mode!r}; set placement.mode=separate"
        )


def processes(group: str, config: Config) -> int:
    """Processes that a config has in a group of pods."""
    match group:
        case "learner":
            return config.train.workers
        case "generation":
            own = config.generation.evaluation_actors + config.generation.reference_actors
            return config.generation.actors + own + config.generation.opponent_actors
        case "grading":
            environments = config.environment.actors if config.environment.name is not None else 0
            return config.grading.actors + environments
        case _:
            return config.reference.actors


def run_name(config: Config) -> str:
    """The run's name as Kubernetes takes it: at most 47 characters for a RayJob.

    Raises:
        ConfigError: nothing of it is left.
    """
    name = re.sub(r"[^a-z0-9-]+", "-", config.run.name.lower()).strip("-")
    if not name or len(name) > 40:
        raise ConfigError(
            f"run.name must have 1 to 40 letters, digits and dashes for Kubernetes, got "
            f"{config.run.name!r}; choose another with run.name=..."
        )
    return name


def _apply(values: dict[str, Any], setting: str) -> str:
    name, equals, text = setting.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set must have the form key=value, got {setting!r}")
    *sections, key = name.split(".")
    at = values
    for section in sections:
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise ConfigError(f"--set {setting!r}: {section} is a value, not a section")
    at[key] = yaml.safe_load(text)
    return name


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"--set {name} is not a known key, got {error['input']!r}; docs/kubernetes.md lists them"
    if error["type"] == "value_error":
        return f"--set {f'{name}.' if name else ''}{error['ctx']['error']}"
    _, _, rule = error["msg"].partition(" should ")
    return f"--set {name} must {rule or error['msg']}, got {error['input']!r}"
