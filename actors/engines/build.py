"""From the config to an engine."""

from typing import TYPE_CHECKING, Any

from distrl.config import Config
from distrl.sampling import Engine, Sleeper

if TYPE_CHECKING:
    from actors.adapters import Adapters


def end_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's end of sequence and those of the model's generation_config.json, of
    which chat models have several."""
    more = getattr(model.generation_config, "eos_token_id", None)
    several = more if isinstance(more, list) else [] if more is None else [more]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *several]))


def build_engine(config: Config, tokenizer: Any, reference_share: float = 0.0) -> Engine:
    """The engine that `generation.engine` names, with the weights in `model.path` as policy version 0.

    Args:
        reference_share: of the reference model in the mixture to sample from; only the engine transformers mixes.
    """
    if config.generation.engine == "fake":
        from actors.engines.fake import FakeEngine
        from distrl.models import check_model

        return FakeEngine(
            vocabulary_size=len(tokenizer),
            context_length=check_model(config.model.path),
            eos_token_id=tokenizer.eos_token_id,
        )

    if config.generation.engine == "vllm":
        return _vllm_engine(config, tokenizer)

    import torch

    from actors.engines.transformers import TransformersEngine
    from distrl.models import load_model

    model: Any = load_model(config.model.path, torch.float32)
    ends = end_token_ids(model, tokenizer)
    if reference_share:
        from actors.engines.mixture import MixtureModel

        reference = load_model(config.reference.path or config.model.path, torch.float32, setting="reference.path")
        model = MixtureModel(model, reference, reference_share)
    return TransformersEngine(
        model,
        eos_token_ids=ends,
        pad_token_id=tokenizer.pad_token_id or 0,
        slots=config.generation.slots,
        threads=config.run.threads_per_process,
        update_mode=config.generation.update_mode,
    )


def build_adapters(config: Config, engine: Engine) -> "Adapters | None":
    """What adds published adapters to the weights of such an engine, where `lora.publish` says so.

    It reads `model.path` a second time: the engine changes its own weights, or has them in another process.
    """
    lora = config.lora
    if not lora.rank or lora.publish == "merged" or config.generation.engine == "fake":
        return None
    import torch

    from actors.adapters import Adapters
    from distrl.lora import LoraSettings, adapter_layers, add_adapters
    from distrl.models import load_model
    from distrl.weights import policy_tensors

    model = load_model(config.model.path, torch.float32)
    base = policy_tensors(model)
    add_adapters(model, LoraSettings(lora.rank, lora.alpha, lora.targets), config.run.seed)
    layers = adapter_layers(model)
    if engine.loads_changes and not isinstance(engine, Sleeper):
        base = {f"{path}.weight": base[f"{path}.weight"] for path in layers}
    return Adapters(base, layers, loads_changes=engine.loads_changes)


def _vllm_engine(config: Config, tokenizer: Any) -> Engine:
    from actors.engines.vllm_start import start_vllm
    from distrl.models import model_without_weights
    from distrl.weights import policy_tensors

    g = config.generation
    llm = start_vllm(
        config.model.path,
        slots=g.slots,
        tensor_parallel_size=g.tensor_parallel_size,
        engine_args=g.engine_args,
        threads=config.run.threads_per_process,
    )
    # Only now: vLLM must see the environment that `start_vllm` prepares when it is imported.
    from actors.engines.vllm import VllmEngine

    model = model_without_weights(config.model.path)
    return VllmEngine(
        llm,
        policy=policy_tensors(model),
        vocabulary_size=model.config.get_text_config().vocab_size,
        context_length=llm.vllm_config.model_config.max_model_len,
        eos_token_ids=(tokenizer.eos_token_id,),
        slots=g.slots,
        update_mode=g.update_mode,
    )
