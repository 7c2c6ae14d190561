"""Sampling outside a run: one model, a list of prompts, no actors. For measuring a model, not for rollouts."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SEQUENCES = 256  # Most that are decoded together; bounds the memory of the key-value cache.


def sample_texts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Sequence[int]],
    noise: NDArray[np.float64],
    *,
    temperature: float = 1.0,
) -> list[str]:
    """One response per prompt.

    Args:
        prompts: texts, or token ids.
        noise: [prompts, T] uniform in [0, 1); T is the most tokens of a response, end-of-sequence included. Row p
            decides prompt p's response, whatever the other prompts are.
        temperature: divides the logits, >= 0; 0 takes the most likely token.
    Returns:
        The text of each response without special tokens, in the order of the prompts.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    token_ids = [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
    for index, ids in enumerate(token_ids):
        by_length[len(ids)].append(index)
    texts = [""] * len(prompts)
    # Prompts of one length need no padding, so that a response cannot depend on its neighbors.
    for indices in by_length.values():
        for start in range(0, len(indices), _SEQUENCES):
            rows = indices[start : start + _SEQUENCES]
            responses = _decode(
                model,
                torch.tensor([token_ids[i] for i in rows]),
                torch.from_numpy(noise[rows]),
                eos=int(tokenizer.eos_token_id),
                temperature=temperature,
            )
            for index, response in zip(rows, responses, strict=True):
                texts[index] = str(tokenizer.decode(response, skip_special_tokens=True))
    return texts


@torch.no_grad()
def _decode(
    model: "PreTrainedModel", prompt_BP: Tensor, noise_BT: Tensor, *, eos: int, temperature: float
) -> list[list[int]]:
    """Token ids up to, not including, the end of sequence."""
    from transformers import DynamicCache

    cache = DynamicCache()
    sampled: list[Tensor] = []
    ended_B = torch.zeros(len(prompt_BP), dtype=torch.bool)
    input_BT = prompt_BP
    for t in range(noise_BT.shape[1]):
        logits_BV = model(input_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        token_B = _choose(logits_BV, noise_BT[:, t], temperature)
        sampled.append(token_B)
        ended_B |= token_B == eos
        if ended_B.all():
            break
        input_BT = token_B[:, None]
    rows = torch.stack(sampled, 1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def _choose(logits_BV: Tensor, noise_B: Tensor, temperature: float) -> Tensor:
    """The token whose share of the cumulative distribution holds the noise; the likeliest one at temperature 0."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    # float64, and scaled to its own end: else rounding could put the noise beyond the last token.
    cumulative_BV = (logits_BV.double() / temperature).softmax(-1).cumsum(-1)
    target_B = noise_B.to(cumulative_BV) * cumulative_BV[:, -1]
    return torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
