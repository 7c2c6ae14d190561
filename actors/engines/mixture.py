"""Two models that sample as one: token by token from policy^(1 - share) reference^share, renormalized."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutput

from distrl.errors import ConfigError


class MixtureModel(nn.Module):
    """A causal language model whose logits are (1 - share) policy + share reference.

    Their softmax at any temperature is the renormalized geometric mixture of the two distributions at that temperature.
    Both models keep keys and values of their own; in the cache the policy's layers come first. Its tensors are the
    policy's, so that new weights are those of the policy and the reference stays as it is.
    """

    def __init__(self, policy: Any, reference: Any, share: float) -> None:
        """
        Args:
            share: of the reference, in [0, 1].
        Raises:
            ConfigError: the models do not have the same tokens, or attend differently.
        """
        super().__init__()
        self._check(policy.config.get_text_config(), reference.config.get_text_config())
        self.policy = policy
        self.reference = reference.eval().requires_grad_(False)
        self._share = share
        self._policy_layers = policy.config.get_text_config().num_hidden_layers

    @staticmethod
    def _check(policy: Any, reference: Any) -> None:
        for name in ("vocab_size", "layer_types", "sliding_window"):
            ours, theirs = (getattr(config, name, None) for config in (policy, reference))
            if name == "layer_types":  # how many layers there are makes no difference
                ours, theirs = (sorted(set(kinds or ())) for kinds in (ours, theirs))
            if ours != theirs:
                raise ConfigError(
                    f"the {name} of policy and reference must be the same to sample from a mixture of the two, got "
                    f"{ours} and {theirs}; take a reference of the policy's architecture"
                )

    @property
    def config(self) -> Any:
        return self.policy.config

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's, under its own names."""
        return self.policy.state_dict(*args, **kwargs)

    def forward(self, *, past_key_values: Cache, **inputs: Any) -> CausalLMOutput:
        """Args: see `transformers`; an empty cache gets the layers of both models."""
        layers = past_key_values.layers
        both = (
            (Cache(layers=layers[: self._policy_layers]), Cache(layers=layers[self._policy_layers :]))
            if layers
            else (DynamicCache(), DynamicCache())
        )
        ours, theirs = (
            model(past_key_values=cache, **inputs).logits
            for model, cache in zip((self.policy, self.reference), both, strict=True)
        )
        if not layers:
            past_key_values.layers = [layer for cache in both for layer in cache.layers]
        mixed: Tensor = torch.lerp(ours, theirs, self._share)
        return CausalLMOutput(logits=mixed)
