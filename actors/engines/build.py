"""From the config to an engine."""

from typing import Any

from distrl.config import Config
from distrl.sampling import Engine


def end_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's end of sequence and those of the model's generation_config.json, of
    which chat models have several."""
    more = getattr(model.generation_config, "eos_token_id", None)
    several = more if isinstance(more, list) else [] if more is None else [more]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *several]))


def build_engine(config: Config, tokenizer: Any) -> Engine:
    """The engine that `generation.engine` names, with the weights in `model.path` as policy version 0."""
    if config.generation.engine == "fake":
        from actors.engines.fake import FakeEngine
        from distrl.models import check_model

        return FakeEngine(
            vocabulary_size=len(tokenizer),
            context_length=check_model(config.model.path),
            eos_token_id=tokenizer.eos_token_id,
        )

    import torch

    from actors.engines.transformers import TransformersEngine
    from distrl.models import load_model

    model = load_model(config.model.path, torch.float32)
    return TransformersEngine(
        model,
        eos_token_ids=end_token_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id or 0,
        slots=config.generation.slots,
        threads=config.run.threads_per_process,
    )
