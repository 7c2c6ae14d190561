"""Scores rollouts with a local model: what a reference actor does with torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from actors.reference import Score
from distrl.logps import pad_rollouts, split_rows
from distrl.models import load_model, load_tokenizer
from distrl.policy_model import PolicyModel


def model_scorer(path: Path, temperature: float, threads: int) -> Score:
    """A scorer with the model in `path`, at the temperature that responses are sampled with."""
    torch.set_num_threads(threads)
    model = PolicyModel(load_model(path, torch.float32).eval())
    pad_token_id = load_tokenizer(path).pad_token_id or 0

    def score(rollouts: pa.RecordBatch) -> Sequence[np.ndarray]:
        tokens = pad_rollouts(rollouts, pad_token_id)
        with torch.inference_mode():
            scores = model(tokens, temperature)
        return split_rows(scores.logps, tokens.response_mask)

    return score
