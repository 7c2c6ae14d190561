"""A causal language model as the learner sees it: tokens in, log-probabilities, entropies and values out.

Shapes: B sequences, L tokens of the longest, T response tokens of the longest, H width, V vocabulary.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from distrl.errors import ConfigError
from distrl.logps import PaddedTokens
from distrl.vocabulary import Head, token_logps

Layout = Literal["bucketed", "packed"]
"""`bucketed`: a row per sequence, padded on the right; `packed`: all sequences one after the other in one row."""


class Scores(NamedTuple):
    """What a policy says about the response tokens of a batch, [B, T] each, 0 where there is no token."""

    logps: Tensor
    """nats, differentiable; float32, or float64 where the model is."""
    entropy: Tensor
    """nats, constant."""
    values: Tensor | None
    """Of the value head, at the state before each token, differentiable; None without a head."""


class PolicyModel(nn.Module):
    """A Hugging Face causal language model whose logits are never whole, with an optional value head.

    The head's logits come from the last hidden states, so that they are computed at response tokens only.

    Args:
        model: with a linear output layer, as nearly all have; its logits may be scaled or capped.
        value_head: adds a linear head on the last hidden state; it starts at 0.
        layout: how sequences lie in a forward pass.
        autocast: the precision of products where parameters are kept in float32; None is that of the parameters.
    Raises:
        ConfigError: the model's logits are made in another way, or packed sequences see each other.
    """

    def __init__(
        self,
        model: Any,
        *,
        value_head: bool = False,
        layout: Layout = "bucketed",
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._layout: Layout = layout
        self._autocast = autocast
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or model.base_model is model:
            raise ConfigError(
                f"model class {type(model).__name__} must have a linear output layer, got "
                f"{type(head).__name__}; choose another model"
            )
        config = model.config.get_text_config()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.value_head = nn.Linear(head.in_features, 1, dtype=head.weight.dtype) if value_head else None
        if self.value_head is not None:
            self.value_head.to(head.weight.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self._check()

    @property
    def device(self) -> torch.device:
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight.device

    def forward(self, tokens: PaddedTokens, temperature: float) -> Scores:
        """Scores of the responses.

        Args:
            tokens: on the model's device.
            temperature: the one that the responses were sampled with, > 0.
        """
        with torch.autocast(tokens.input_ids.device.type, self._autocast, enabled=self._autocast is not None):
            states = self._states(tokens)
        head = self._head()
        targets = _responses(tokens)[tokens.response_mask]
        flat = token_logps(states.to(self._autocast or states.dtype), head, targets[:, None], temperature)
        values = None
        if self.value_head is not None:
            values = _spread(self.value_head(states.to(self.value_head.weight.dtype))[:, 0], tokens)
        return Scores(_spread(flat.logps[:, 0], tokens), _spread(flat.entropy, tokens), values)

    def _head(self) -> Head:
        layer = self.model.get_output_embeddings()
        return Head(layer.weight, layer.bias, self._scale, self._softcap)

    def _states(self, tokens: PaddedTokens) -> Tensor:
        """[N, H] last hidden states before each response token, in the order of `response_mask`."""
        ids, lengths = _aligned(tokens)
        L = ids.shape[1]
        positions = torch.arange(L, device=ids.device)
        # Token t of a response comes from the state at its prompt's last token plus t.
        first = tokens.prompt_lengths[:, None] - 1
        at = (first + torch.arange(tokens.response_mask.shape[1], device=ids.device))[tokens.response_mask]
        row = torch.nonzero(tokens.response_mask)[:, 0]
        if self._layout == "bucketed":
            # A causal model never looks at what is on the right, so that padding needs no mask.
            states = self._run(ids, positions.expand_as(ids))
            return states[row, at]
        kept = positions < lengths[:, None]
        # Without a mask, transformers takes positions that begin anew for the border of a sequence.
        states = self._run(ids[kept][None], positions.expand_as(ids)[kept][None])
        starts = lengths.cumsum(0) - lengths
        return states[0, starts[row] + at]

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    def _check(self) -> None:
        """Compares the logits with the model's own on two short sequences."""
        name = type(self.model).__name__
        device = self.device
        if device.type == "meta":
            return
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = (torch.arange(10, device=device) * 7 + 1).remainder(vocabulary).reshape(2, 5)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            expected = self.model(input_ids=ids, use_cache=False).logits.float()
            positions = torch.arange(5, device=device).expand(2, 5)
            if self._layout == "packed":
                states = self._run(ids.reshape(1, 10), positions.reshape(1, 10)).reshape(2, 5, -1)
            else:
                states = self._run(ids, positions)
            found = self._head().logits(states.flatten(0, 1)).float().unflatten(0, (2, 5))
        self.model.train(training)
        width = 0.05 if expected.abs().max() > 0 and states.dtype == torch.bfloat16 else 1e-3
        if not torch.allclose(found, expected, rtol=width, atol=width * float(expected.abs().max())):
            also = ", one sequence per row" if self._layout == "bucketed" else " and keep packed sequences apart"
            raise ConfigError(
                f"model class {name} must make its logits by a linear layer, a scale (logit_scale, logits_scaling) and "
                f"a cap (final_logit_softcapping){also}; the largest difference is "
                f"{float((found - expected).abs().max()):.3g}"
                + ("; choose another model" if self._layout == "bucketed" else "; set train.layout to bucketed")
            )


def response_logps(model: Any, tokens: PaddedTokens, temperature: float) -> Tensor:
    """log softmax(logits / temperature) of each response token under a Hugging Face model; see `PolicyModel`.

    Returns:
        [B, T] in nats, differentiable; 0 where there is no response token.
    """
    scores: Scores = PolicyModel(model)(tokens, temperature)
    return scores.logps


def _aligned(tokens: PaddedTokens) -> tuple[Tensor, Tensor]:
    """[B, L] ids that begin in column 0, cut to the longest, and the lengths [B]."""
    T = tokens.response_mask.shape[1]
    P = tokens.input_ids.shape[1] - T
    lengths = tokens.prompt_lengths + tokens.response_mask.sum(1)
    columns = torch.arange(int(lengths.max()), device=lengths.device) + (P - tokens.prompt_lengths)[:, None]
    return tokens.input_ids.gather(1, columns.clamp(max=P + T - 1)), lengths


def _responses(tokens: PaddedTokens) -> Tensor:
    return tokens.input_ids[:, tokens.input_ids.shape[1] - tokens.response_mask.shape[1] :]


def _spread(values: Tensor, tokens: PaddedTokens) -> Tensor:
    """One value per response token as [B, T], 0 elsewhere."""
    values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    padded = torch.zeros(tokens.response_mask.shape, dtype=values.dtype, device=values.device)
    return padded.masked_scatter(tokens.response_mask, values)
