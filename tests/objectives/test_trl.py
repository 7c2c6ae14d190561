"""Agreement with TRL's GRPOTrainer on the same tensors: loss and gradient of grpo, dr_grpo, dapo, gspo, cispo.

Needs `pip install trl`, which is no dependency of distrl.
"""

import importlib.util
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from distrl.objectives import build, compute
from tests.objectives.tabular import close, random

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed: pip install trl")

CASES = {
    "grpo": {"loss_type": "grpo", "beta": 0.04},
    "grpo without kl": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
}
OPTIONS: dict[str, dict[str, float | str]] = {
    "grpo": {"epsilon": 0.0},
    "grpo without kl": {"epsilon": 0.0, "kl_coefficient": 0.0},
    "dr_grpo": {"max_length": 9.0},
    "dapo": {"epsilon": 0.0, "dynamic_sampling": "none"},
    "gspo": {"epsilon": 0.0, "clip_low": 0.1, "clip_high": 0.15},
    "cispo": {"epsilon": 0.0, "high": 1.3},
}


def trl_loss(logps: Tensor, tensors: dict[str, Tensor], credit: Tensor, **config: float | str) -> Tensor:
    """TRL's loss of one batch in evaluation mode, where it is not divided for gradient accumulation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import GRPOTrainer

    mask = tensors["mask"].to(logps.dtype)
    trainer = SimpleNamespace(
        **{"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "importance_sampling_level": "token", **config},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=9,
        model=SimpleNamespace(training=False),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
    )
    inputs = {
        **{name: torch.zeros(len(mask), 1) for name in ("prompt_ids", "prompt_mask")},
        **dict.fromkeys(("completion_ids", "completion_mask"), mask),
        "advantages": credit,
        "old_per_token_logps": tensors["behavior_logps"],
        "ref_per_token_logps": tensors["ref_logps"],
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_agree_with_trl(name: str) -> None:
    behavior = -random(8, 6, seed=1).exp()
    rewards, group = random(8, seed=2), torch.arange(8) // 4
    tensors = {
        "mask": torch.arange(6) < torch.arange(8)[:, None] % 5 + 2,
        "behavior_logps": behavior,
        "ref_logps": behavior + 0.2 * random(8, 6, seed=3),
    }
    mean = torch.stack([rewards[group == g].mean() for g in group])
    deviation = torch.stack([rewards[group == g].std(correction=0) for g in group])
    credit = (rewards - mean) / (deviation if name != "dr_grpo" else 1.0)
    logps = (behavior + 0.3 * random(8, 6, seed=4)).requires_grad_()
    theirs = trl_loss(logps, tensors, credit, **CASES[name])
    recipe = build(name.split()[0], **OPTIONS[name])
    ours = compute(recipe, {**tensors, "logps": logps, "rewards": rewards, "group": group}).loss
    close(torch.autograd.grad(ours, logps)[0], torch.autograd.grad(theirs, logps, retain_graph=True)[0])
    if name != "cispo":  # TRL reports -w A log pi, we the potential
        close(ours, theirs)
