"""From the config to an engine."""

from typing import Any

from distrl.config import Config
from distrl.sampling import Engine


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

    return TransformersEngine(
        load_model(config.model.path, torch.float32),
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id or 0,
        slots=config.generation.slots,
        threads=config.run.threads_per_process,
    )
