"""What runs inside vLLM's worker processes: takes new weights out of a file in shared memory.

Only vLLM imports this module, through `actors.engines.vllm_plugin`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.engines.shared_weights import map_weights
from distrl.errors import PolicyError


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on: there is no connection."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The file with the weights."""

    path: str
    placed: Sequence[dict[str, Any]]
    """`actors.engines.shared_weights.Placed` as dictionaries."""


class SharedMemoryTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """Maps the weights in `receive_weights` and loads them in `finish_weight_update`.

    The order matters: what can be refused is refused before the model is touched, in every worker, so that an update
    is either made in all of them or in none. Loading is vLLM's layerwise reload, because the tensors that it computes
    with are not those of a checkpoint: query, key and value are one matrix, and on a CPU linear weights are packed.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._staged: dict[str, Tensor] = {}

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self._staged = {}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self._staged = map_weights(update_info.path, update_info.placed)

    def finish_weight_update(self) -> None:
        """
        Raises:
            PolicyError: a parameter of vLLM's model got nothing from the given tensors; the model is then a mixture.
        """
        staged, self._staged = self._staged, {}
        parameters = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights(iter(staged.items()))
        finalize_layerwise_reload(self.model, self.model_config)
        _process_tied(self.model)
        if missed := sorted(parameters - loaded):
            raise PolicyError(
                f"vLLM's model must find every parameter among the {len(staged)} published tensors, "
                f"got nothing for {len(missed)}, the first {missed[0]!r}; use generation.engine=transformers"
            )
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def shutdown(self) -> None:
        self._staged = {}


def _process_tied(model: torch.nn.Module) -> None:
    """Process layers again whose weight belongs to another layer, such as an output layer tied to the embedding.

    The reload processes the owner alone. On a CPU the output layer would go on computing with its packed copy of the
    old weights.
    """
    owned: set[int] = set()
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is None or weight.numel() == 0:
            continue
        if id(weight) in owned:
            method: Any = layer.quant_method
            method.process_weights_after_loading(layer)
        owned.add(id(weight))
