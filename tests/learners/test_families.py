"""Causal language models of several families are trained a step, exported, and published to a generation engine."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from actors.engines.transformers import TransformersEngine
from distrl.errors import ConfigError
from distrl.lora import LoraSettings, Publish, add_adapters
from distrl.models import load_model
from distrl.objectives import build
from distrl.policy_model import Layout, PolicyModel, response_logps
from distrl.sampling import SampleRequest, SamplingParams
from learners.batches import training_batch
from learners.checkpoint import TrainState
from learners.logp_check import LogpCheckSettings
from learners.optimizer import OptimizerSettings
from learners.parallel import shardable_blocks
from learners.trainer import LoopSettings, Trainer
from tests.builders import refusal
from tests.learners.workers import Tokenizer, tickets

COMMON: Mapping[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
WINDOW: Mapping[str, Any] = {**COMMON, "head_dim": 8, "sliding_window": 6}
EXPERTS: Mapping[str, Any] = {**COMMON, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: Mapping[str, Callable[[], Any]] = {
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(head_dim=8, tie_word_embeddings=True, **COMMON)),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**COMMON)),
    "gemma2": lambda: t.Gemma2ForCausalLM(
        t.Gemma2Config(final_logit_softcapping=5.0, query_pre_attn_scalar=8, **WINDOW)
    ),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(query_pre_attn_scalar=8, **WINDOW)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**WINDOW)),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(moe_intermediate_size=16, **EXPERTS)),
    "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(logit_scale=0.2, **COMMON)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=1)
    ),
}


def make(family: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family]()
    model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")  # sdpa caps no scores
    return model


def trainer_of(model: Any, directory: Path, recipe: str = "topr", publish: Publish = "merged") -> Trainer:
    settings = LoopSettings(
        steps=2,
        temperature=1.0,
        micro_batch_tokens=64,
        checkpoint_every_steps=1,
        checkpoints=directory,
        optimizer=OptimizerSettings(1e-2, 0, 0.0, (0.9, 0.95), 1.0),
        logp_check=LogpCheckSettings(0, 1.0, 0, "keep", 1.0),
        skipped_in_a_row=1,
        publish=publish,
    )
    return Trainer(model, Tokenizer(), build(recipe), settings)


def written(trainer: Trainer) -> Path:
    trainer.begin_checkpoint(TrainState(1, 1))
    found = trainer.finished_checkpoint(wait=True)
    assert found is not None
    return Path(found.location)


async def sampled(model: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[list[int], list[float]]:
    """A greedy-free sample of twelve tokens, which is longer than the windows, after the weights were loaded."""
    engine = TransformersEngine(model, eos_token_ids=(1,), pad_token_id=0, slots=32, threads=1)
    try:
        await engine.load(1, tensors)
        params = SamplingParams(max_new_tokens=12)
        (sample,) = await engine.sample(SampleRequest("a", (5, 6, 7, 8, 9, 10, 11), 1, params, (1, 2)))
    finally:
        await engine.close()
    return list(sample.token_ids), list(sample.logps)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_trained_a_step_and_sampled_from_after_publication(family: str, tmp_path: Path) -> None:
    model = make(family)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    trainer = trainer_of(model, tmp_path)
    result = trainer.step(trainer.training_batch(tickets(0)), 1)
    assert result.skipped is None
    assert any(not torch.equal(before[name], x) for name, x in model.state_dict().items())

    tokens, logps = asyncio.run(sampled(make(family), trainer.policy_tensors()))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, *tokens]])
    with torch.no_grad():
        table = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), 1)
    expected = [float(table[6 + i, token]) for i, token in enumerate(tokens)]
    assert logps == pytest.approx(expected, abs=1e-4)
    assert len(tokens) > 1

    exported = load_model(written(trainer), torch.float32)
    with torch.no_grad():
        again = torch.log_softmax(exported(input_ids=ids, use_cache=False).logits[0].double(), 1)
    torch.testing.assert_close(again, table, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_moe"])  # whose kernel has no float64
def test_sequences_packed_into_a_row_are_scored_like_alone(family: str) -> None:
    model = make(family).double().eval()
    batch = training_batch(tickets(0), 0)
    atol = 1e-6 if family == "gemma2" else 1e-10  # plain attention makes its weights in float32
    layouts: tuple[Layout, Layout] = ("bucketed", "packed")
    with torch.no_grad():
        found = [PolicyModel(model, layout=layout)(batch.tokens, 1.0).logps for layout in layouts]
        for row in range(len(batch.tokens.input_ids)):
            alone = response_logps(model, batch.tokens.rows(torch.tensor([row])), 1.0)[0]
            for scores in found:
                torch.testing.assert_close(scores[row, : len(alone)], alone, rtol=0, atol=atol)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_adapters_alone_are_trained_and_published_merged(family: str, tmp_path: Path) -> None:
    model = make(family)
    plain = {name: x.clone() for name, x in model.state_dict().items()}
    targets = ("q_proj", "v_proj") if family == "qwen3" else ("c_attn",)
    add_adapters(model, LoraSettings(rank=2, alpha=4.0, targets=targets), seed=3)
    trainer = trainer_of(model, tmp_path)
    start = trainer.policy_tensors()
    assert start.keys() == {name for name in plain if name != "lm_head.weight" or name in start}
    assert all(torch.equal(start[name], plain[name]) for name in start)  # an adapter starts as no change

    for step in (1, 2):
        trainer.step(trainer.training_batch(tickets(step)), step)
    tensors = trainer.policy_tensors()
    moved = {name for name in tensors if not torch.equal(tensors[name], plain[name])}
    assert moved
    assert all(any(target in name for target in targets) for name in moved)

    ids = torch.tensor([[3, 4, 5, 6, 7]])
    exported = load_model(written(trainer), torch.float32)
    fresh = make(family)
    fresh.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        for merged in (exported, fresh.eval()):
            torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)

    again = make(family)
    add_adapters(again, LoraSettings(rank=2, alpha=4.0, targets=targets), seed=4)
    resumed = trainer_of(again, tmp_path)
    resumed.restore(tmp_path / "step-000001-v1")
    found = resumed.policy_tensors()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_layers_that_are_not_there_are_refused() -> None:
    model = make("llama")
    message = refusal(ConfigError, lambda: add_adapters(model, LoraSettings(2, 4.0, ("nothing",)), seed=0))
    assert message.startswith("lora.targets must name linear layers of LlamaForCausalLM, got ['nothing']: ")


def test_a_model_that_cannot_be_sharded_says_which_module() -> None:
    model = make("llama")
    assert len(shardable_blocks(model)) == 2
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert refusal(ConfigError, lambda: shardable_blocks(model)) == (
        "train.parallel: the blocks of model class LlamaForCausalLM must have parameters of their own to be sharded, "
        "got one that model.layers.0 and model.layers.1 share; use ddp"
    )
    model._no_split_modules = ["Other"]
    assert refusal(ConfigError, lambda: shardable_blocks(model)) == (
        "train.parallel: model class LlamaForCausalLM must name the blocks that can be sharded (_no_split_modules), "
        "got ['Other'], of which it has none; use ddp"
    )


def test_a_gradient_that_is_not_finite_is_skipped_with_its_tickets_named(tmp_path: Path) -> None:
    from distrl.errors import RunError

    trainer = trainer_of(make("llama"), tmp_path)
    batch = trainer.training_batch(tickets(1))
    good = trainer.training_batch(tickets(2))
    batch.tensors["rewards"][3] = torch.nan  # a row of the second ticket, number 5
    before = {name: x.clone() for name, x in trainer.policy_tensors().items()}
    result = trainer.step(batch, 1)
    assert result.skipped is not None
    assert result.skipped.startswith(
        "step 1: the gradient's norm must be finite, got nan (loss nan); the loss of these"
    )
    assert result.skipped.endswith("not finite: 5; the weights of the step before are unchanged")
    assert all(torch.equal(before[name], x) for name, x in trainer.policy_tensors().items())

    assert trainer.step(good, 2).skipped is None  # the count begins anew
    trainer.step(batch, 3)
    message = refusal(RunError, lambda: trainer.step(batch, 4))
    assert message.startswith("limits.skipped_steps_in_a_row: at most 1 steps may be skipped in a row, got 2; step 4: ")
