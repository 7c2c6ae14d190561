"""Padding, and log-probabilities of responses against one unpadded float64 sequence at a time."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from distrl.errors import ConfigError
from distrl.logps import pad_lists, pad_rollouts, split_rows
from distrl.policy_model import Layout, PolicyModel, response_logps
from tests.builders import generation_batch, refusal

torch.set_num_threads(1)

PAD = 0
LAYOUTS: tuple[Layout, ...] = ("bucketed", "packed")
PROMPTS = [(5, 6, 7, 8, 9), (3,), (4, 4), (9, 2, 11)]
RESPONSES = [(2, 3), (1, 5, 2, 4), (3,), (2, 7)]


def rollouts() -> pa.RecordBatch:
    """Four tickets of different prompt lengths, with responses of 1 to 7 tokens."""
    batches = [generation_batch(i, r, p) for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True))]
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


@pytest.fixture(scope="module", name="model")
def tiny_model() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
        # Far from uniform, so that a wrong position or a wrong token shows.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.5)
    return model


def unpadded_logps(model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float) -> Tensor:
    """Second route: the whole sequence alone, no padding, no mask, every logit, in the model's precision."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0] / temperature
    table = torch.log_softmax(logits, dim=-1)
    return torch.stack([table[len(prompt) + t - 1, token] for t, token in enumerate(response)])


def sequences() -> list[tuple[list[int], list[int]]]:
    rows = rollouts().to_pylist()
    return [(row["prompt_token_ids"], row["response_token_ids"]) for row in rows]


def test_padding_puts_prompts_left_and_responses_right_of_one_column() -> None:
    tokens = pad_rollouts(rollouts(), PAD)
    P, T = 5, 7
    assert tokens.input_ids.shape == (9, P + T)
    assert tokens.response_mask.shape == (9, T)
    for row, (prompt, response) in enumerate(sequences()):
        expected = [PAD] * (P - len(prompt)) + prompt + response + [PAD] * (T - len(response))
        assert tokens.input_ids[row].tolist() == expected
        assert tokens.response_mask[row].tolist() == [t < len(response) for t in range(T)]
        assert tokens.prompt_lengths[row] == len(prompt)


def test_a_slice_is_padded_like_its_own_rows() -> None:
    part = pad_rollouts(rollouts().slice(2, 5), PAD)
    alone = pad_rollouts(pa.RecordBatch.from_pylist(rollouts().to_pylist()[2:7], schema=rollouts().schema), PAD)
    assert torch.equal(part.input_ids, alone.input_ids)
    assert torch.equal(part.response_mask, alone.response_mask)
    assert torch.equal(part.prompt_lengths, alone.prompt_lengths)


def test_rows_are_cut_to_their_own_longest_prompt_and_response() -> None:
    tokens = pad_rollouts(rollouts(), PAD)
    index = torch.tensor([3, 0, 6])  # prompts of 1, 5 and 2 tokens, responses of 5, 2 and 3
    part = tokens.rows(index)

    assert part.input_ids.shape == (3, 5 + 5)
    alone = pad_rollouts(rollouts().take(pa.array(index.numpy())), PAD)
    assert torch.equal(part.input_ids, alone.input_ids)
    assert torch.equal(part.response_mask, alone.response_mask)
    assert torch.equal(part.prompt_lengths, alone.prompt_lengths)


@pytest.mark.parametrize("name", ["behavior_logps", "policy_versions", "loss_mask"])
def test_lists_are_padded_with_zeros_and_split_again(name: str) -> None:
    dtype = {"behavior_logps": torch.float32, "policy_versions": torch.int64, "loss_mask": torch.bool}[name]
    mask = pad_rollouts(rollouts(), PAD).response_mask
    padded = pad_lists(rollouts().column(name), mask, dtype)

    assert padded.dtype == dtype
    assert not padded[~mask].any()
    assert [row.tolist() for row in split_rows(padded, mask)] == rollouts().column(name).to_pylist()


def test_lists_of_a_slice_are_its_own() -> None:
    part = rollouts().slice(3, 2)
    mask = pad_rollouts(part, PAD).response_mask
    padded = pad_lists(part.column("behavior_logps"), mask, torch.float32)
    assert [row.tolist() for row in split_rows(padded, mask)] == part.column("behavior_logps").to_pylist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_each_sequence_alone(
    model: Qwen3ForCausalLM, temperature: float, layout: Layout
) -> None:
    """However the sequences lie in a forward pass: none sees another, or padding."""
    tokens = pad_rollouts(rollouts(), PAD)
    with torch.no_grad():
        exact = [unpadded_logps(model.double(), p, r, temperature) for p, r in sequences()]
        found = PolicyModel(model, layout=layout)(tokens, temperature).logps
        single = PolicyModel(model.float(), layout=layout)(tokens, temperature).logps

    assert found.dtype == torch.float64
    assert single.dtype == torch.float32
    assert not found[~tokens.response_mask].any()
    for row, other, expected in zip(
        split_rows(found, tokens.response_mask), split_rows(single, tokens.response_mask), exact, strict=True
    ):
        np.testing.assert_allclose(row, expected.numpy(), rtol=0, atol=1e-10)
        np.testing.assert_allclose(other, expected.numpy(), rtol=1e-5, atol=2e-5)
    assert min(e.min() for e in exact) < -3  # the comparison is not one of zeros
    # The temperature matters: at the other one the numbers are far from these.
    with torch.no_grad():
        other = [unpadded_logps(model.double(), p, r, 1.6 - temperature) for p, r in sequences()]
    assert max((a - b).abs().max().item() for a, b in zip(exact, other, strict=True)) > 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_count_from_the_prompt_s_first_token(layout: Layout) -> None:
    """Qwen3 sees only distances between tokens, so this takes a model with absolute positions."""
    config = GPT2Config(
        vocab_size=24,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    tokens = pad_rollouts(rollouts(), PAD)
    with torch.no_grad():
        found = PolicyModel(model, layout=layout)(tokens, 1.0).logps
        exact = [unpadded_logps(model, p, r, 1.0) for p, r in sequences()]
    for row, expected in zip(split_rows(found, tokens.response_mask), exact, strict=True):
        np.testing.assert_allclose(row, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_without_any_padding_the_result_is_the_same(model: Qwen3ForCausalLM) -> None:
    model.float()
    batch = generation_batch(0, (3, 3), (5, 6))
    tokens = pad_rollouts(batch, PAD)
    with torch.no_grad():
        found = response_logps(model, tokens, 1.0)
        for row, response in zip(found, batch.column("response_token_ids").to_pylist(), strict=True):
            expected = unpadded_logps(model, [5, 6], response, 1.0)
            torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


def test_the_padding_token_does_not_matter(model: Qwen3ForCausalLM) -> None:
    model.float()
    with torch.no_grad():
        results = [response_logps(model, pad_rollouts(rollouts(), pad), 1.0) for pad in (0, 23)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_a_row_s_result_does_not_depend_on_its_neighbors(model: Qwen3ForCausalLM) -> None:
    model.float()
    tokens = pad_rollouts(rollouts(), PAD)
    index = torch.tensor([8, 2, 0])
    with torch.no_grad():
        whole = response_logps(model, tokens, 1.0)
        part = response_logps(model, tokens.rows(index), 1.0)
    torch.testing.assert_close(part, whole[index][:, : part.shape[1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_that_of_the_unpadded_sequences_and_finite(model: Qwen3ForCausalLM, layout: Layout) -> None:
    """In float64, so that nothing but the padding differs; each token with another weight."""
    model.double()
    tokens = pad_rollouts(rollouts(), PAD)
    weights = torch.randn(tokens.response_mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    model.zero_grad()
    (PolicyModel(model, layout=layout)(tokens, 0.8).logps * weights).sum().backward()
    padded = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows = [unpadded_logps(model, p, r, 0.8) for p, r in sequences()]
    sum((row * weights[i, : len(row)]).sum() for i, row in enumerate(rows)).backward()  # type: ignore[union-attr]

    assert set(padded) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert padded[name].isfinite().all(), name
        assert parameter.grad is not None
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(padded[name], parameter.grad, rtol=0, atol=1e-10 * scale, msg=name)
        assert scale > 0, name
    model.zero_grad()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_is_that_of_the_whole_distribution_at_each_response_token(
    model: Qwen3ForCausalLM, temperature: float
) -> None:
    tokens = pad_rollouts(rollouts(), PAD)
    _, entropy, values = PolicyModel(model.float())(tokens, temperature)
    assert values is None
    assert not entropy.requires_grad
    assert torch.equal(entropy[~tokens.response_mask], torch.zeros(int((~tokens.response_mask).sum())))
    with torch.no_grad():
        for row, (prompt, response) in enumerate(sequences()):
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
            table = torch.distributions.Categorical(logits=logits.double() / temperature).entropy()
            expected = table[len(prompt) - 1 : len(prompt) + len(response) - 1]
            torch.testing.assert_close(entropy[row, : len(response)].double(), expected, atol=1e-5, rtol=1e-5)


def test_values_are_those_of_the_state_before_each_token(model: Qwen3ForCausalLM) -> None:
    tokens = pad_rollouts(rollouts(), PAD)
    policy = PolicyModel(model.double(), value_head=True)
    assert policy.value_head is not None
    assert not policy(tokens, 1.0).values.any()  # it starts at 0
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        values = policy(tokens, 1.0).values
        for row, (prompt, response) in enumerate(sequences()):
            ids = torch.tensor([prompt + response])
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
            before = states[len(prompt) - 1 : len(prompt) + len(response) - 1]
            expected = policy.value_head(before)[:, 0]
            torch.testing.assert_close(values[row, : len(response)], expected, rtol=0, atol=1e-10)
            assert not values[row, len(response) :].any()


def test_a_model_whose_logits_are_made_in_another_way_is_refused(model: Qwen3ForCausalLM) -> None:
    class Doubled(Qwen3ForCausalLM):  # type: ignore[misc]
        def forward(self, **arguments: Any) -> Any:
            output = super().forward(**arguments)
            output.logits = output.logits * 2
            return output

    other = Doubled(model.config).float()
    message = refusal(ConfigError, lambda: PolicyModel(other))
    assert message.startswith(
        "model class Doubled must make its logits by a linear layer, a scale (logit_scale, logits_scaling) and a cap "
        "(final_logit_softcapping), one sequence per row; the largest difference is "
    )
    assert message.endswith("; choose another model")
