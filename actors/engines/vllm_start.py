"""From the config to a running vLLM."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.engines.vllm_plugin import BACKEND, OWNER
from distrl.errors import ConfigError

CPU_CACHE_BYTES = 4 << 30
"""Most memory that keys and values get on a CPU unless the config says; vLLM would take nearly all there is."""

RESERVED = {
    "model": "model.path",
    "max_num_seqs": "generation.slots",
    "tensor_parallel_size": "generation.tensor_parallel_size",
    "skip_tokenizer_init": "",
    "generation_config": "",
    "logprobs_mode": "",
    "weight_transfer_config": "",
    "disable_log_stats": "",
    "speculative_config": "",
    "enable_lora": "",
}
"""Engine arguments that distrl sets itself, and the key of the config that each comes from, if any."""


def start_vllm(
    model: Path, *, slots: int, tensor_parallel_size: int, engine_args: Mapping[str, Any], threads: int
) -> Any:
    """vLLM's `AsyncLLM` with the weights in `model`; returns when it can sample, in about a minute.

    Args:
        engine_args: fields of vLLM's `AsyncEngineArgs` beside those that distrl sets.
        threads: of each of vLLM's worker processes on a CPU.
    Raises:
        ConfigError: an argument is unknown, reserved, or refused by vLLM.
    """
    _environment(threads)
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    check_engine_args(engine_args)
    _check_plugin()
    defaults: dict[str, Any] = {}
    if current_platform.is_cpu():
        # Compiling takes a minute and gains nothing on models that a CPU can hold.
        defaults = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
    try:
        arguments = AsyncEngineArgs(
            **{**defaults, **engine_args},
            model=str(model),
            max_num_seqs=slots,
            tensor_parallel_size=tensor_parallel_size,
            skip_tokenizer_init=True,
            generation_config="vllm",  # not the model's own temperature, top-p and stop tokens
            logprobs_mode="processed_logprobs",  # of the distribution really sampled
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            disable_log_stats=True,
        )
        config = arguments.create_engine_config()
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"generation.engine_args must be accepted by vLLM, got {dict(engine_args)}: {error}"
        ) from error
    return AsyncLLM.from_vllm_config(config, disable_log_stats=True)


def check_engine_args(engine_args: Mapping[str, Any]) -> None:
    """Refuse what vLLM does not know and what distrl sets itself.

    Raises:
        ConfigError: names the key.
    """
    from dataclasses import fields
    from difflib import get_close_matches

    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in fields(AsyncEngineArgs)}
    for name, value in engine_args.items():
        where = f"generation.engine_args.{name}"
        if name in RESERVED:
            remedy = f"set {RESERVED[name]} instead" if RESERVED[name] else "leave it out"
            raise ConfigError(f"{where} must not be given, because distrl decides it, got {value!r}; {remedy}")
        if name not in known:
            close = get_close_matches(name, known - set(RESERVED), n=1)
            remedy = f"did you mean {close[0]}?" if close else "see the fields of vllm.AsyncEngineArgs"
            raise ConfigError(f"{where} must be an engine argument of vLLM, got {value!r}; {remedy}")


def _check_plugin() -> None:
    """vLLM's processes look the plug-in up in the installed package, and only report that they did not find it."""
    from importlib.metadata import entry_points

    if not entry_points(group="vllm.general_plugins", name="distrl"):
        raise ConfigError(
            "generation.engine vllm must find distrl's plug-in among the installed packages, found none; install "
            "distrl into this environment: pip install --no-deps -e ."
        )


def _environment(threads: int) -> None:
    """What vLLM and its processes read from the environment; what the user set stays."""
    os.environ[OWNER] = str(os.getpid())
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # a run reports to nobody
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # Otherwise each engine takes every core, and two engines the same ones.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind":
        os.environ["OMP_NUM_THREADS"] = str(threads)
