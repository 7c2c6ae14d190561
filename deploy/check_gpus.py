"""What a config asks of GPUs, checked before anything starts; whether a cluster has them, `deploy.placement` says."""

from deploy.roles import generation_actors, own_actors
from distrl.config import Config
from distrl.errors import ConfigError
from distrl.placement import Claim, check_shares
from distrl.schema import Role
from distrl.tickets import POLICY_WEIGHTS, weights_of


def check_placement(config: Config, samples: frozenset[Role]) -> None:
    """Refuse what no cluster could run; whether a certain one can, is known when it is there.

    Raises:
        ConfigError: names the key, and the shortfall where it is one.
    """
    p = config.placement
    if p.mode == "cpu":
        return
    if config.generation.engine == "transformers":
        raise ConfigError(
            f"placement.mode must be cpu for generation.engine transformers, which runs on the CPU, got {p.mode}; "
            "leave it out, or take another engine"
        )
    if p.mode == "turns" and config.train.max_staleness != 0:
        raise ConfigError(
            f"train.max_staleness must be 0 for placement.mode turns, got {config.train.max_staleness}; generation "
            "and learner never work at the same time there, and an asynchronous run needs that they do"
        )
    if p.mode != "separate" and config.train.device == "cuda":
        for key, value, only in (("workers", config.train.workers, 1), ("parallel", config.train.parallel, "ddp")):
            if value != only:
                raise ConfigError(
                    f"train.{key} must be {only} for placement.mode {p.mode} with train.device cuda, got {value}; "
                    "there is one GPU, which has one learner: set placement.mode=separate"
                )
    _check_one_engine(config, samples)
    for key in ("gpu_memory_utilization", "enable_sleep_mode"):
        if p.mode != "separate" and key in config.generation.engine_args:
            raise ConfigError(
                f"generation.engine_args.{key} must not be set for placement.mode {p.mode}, which sets it, got "
                f"{config.generation.engine_args[key]!r}; set placement.generation_share instead"
            )
    if p.mode != "separate" and config.generation.tensor_parallel_size > 1:
        raise ConfigError(
            f"generation.tensor_parallel_size must be 1 for placement.mode {p.mode}, where there is one GPU, got "
            f"{config.generation.tensor_parallel_size}; set placement.mode=separate"
        )
    actors = sum(generation_actors(config, samples).values())
    if p.mode in ("shared", "turns"):
        shares = [Claim(f"generation-{i}", p.generation_share) for i in range(actors)]
        if p.mode == "shared" and config.train.device == "cuda":
            shares.append(Claim("learner-0", p.learner_share))
        check_shares(shares)


def _check_one_engine(config: Config, samples: frozenset[Role]) -> None:
    """
    Raises:
        ConfigError: an actor on a GPU would hold several vLLMs, one per set of weights.
    """
    own = own_actors(config)
    for role in sorted(samples):
        if config.generation.engine == "vllm" and weights_of(role) != POLICY_WEIGHTS and not own[role]:
            raise ConfigError(
                f"generation.{role}_actors must be >= 1 for generation.engine vllm with placement.mode "
                f"{config.placement.mode}, got 0; a vLLM holds one set of weights, and a second one for the role would "
                "take memory of the same GPU that the first has: give the role actors of its own"
            )


def check_transport(config: Config) -> None:
    """Refuse a way of new weights that its two ends cannot take.

    Raises:
        ConfigError: names the key.
    """
    way, p = config.generation.transport, config.placement
    if way == "store":
        return
    if config.generation.engine != "vllm":
        raise ConfigError(
            f"generation.transport must be store for generation.engine {config.generation.engine}, which has no GPU, "
            f"got {way}; leave it out, or take the engine vllm"
        )
    if config.train.device != "cuda":
        raise ConfigError(
            f"generation.transport must be store where train.device is {config.train.device}, got {way}; the bytes go "
            "from the learner's GPU: leave it out, or set train.device=cuda"
        )
    needs = {"nccl": "separate", "ipc": "shared"}[way]
    if p.mode != needs:
        why = {
            "nccl": "a group of NCCL has each process on a GPU of its own",
            "ipc": "CUDA IPC shares memory of one GPU that both are on at the same time",
        }[way]
        raise ConfigError(
            f"generation.transport {way} needs placement.mode {needs}, got {p.mode}; {why}: set "
            f"placement.mode={needs}, or leave generation.transport out"
        )
    limits = config.limits
    if not 2 * limits.transport_timeout_s < limits.sync_timeout_s:
        raise ConfigError(
            f"limits.transport_timeout_s must be less than half of limits.sync_timeout_s ({limits.sync_timeout_s:g}), "
            f"got {limits.transport_timeout_s:g}; what is late must have time left to come from the store"
        )
