"""The slot cache against the cache of transformers, and the moves that its memory makes."""

import torch
from torch import Tensor
from transformers import DynamicCache

from actors.engines.cache import POSITION_BUCKET, LayerStates, SlotCache
from tests.engines.tiny import tiny_model

HEADS, SIZE = 2, 3


def states(prompts: int, length: int, seed: int = 0) -> LayerStates:
    """Keys and values of different sizes, as some models have them."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(prompts, HEADS, length, SIZE, generator=generator),
        torch.randn(prompts, HEADS, length, SIZE + 1, generator=generator),
    )


def index(*values: int) -> Tensor:
    return torch.tensor(values)


def test_an_update_writes_each_row_at_its_own_position_and_nowhere_else() -> None:
    cache = SlotCache(slots=3, context_length=32)
    prompts = states(1, 16)
    cache.fill(index(0, 1, 2), index(0, 0, 0), [prompts])
    new = states(3, 1, seed=1)
    cache.aim(index(5, 9, 2), 16)
    keys, values = cache.update(*new, 0)
    expected = [state.expand(3, -1, -1, -1).clone() for state in prompts]
    for row, position in enumerate((5, 9, 2)):
        for state, written in zip(expected, new, strict=True):
            state[row, :, position] = written[row, :, 0]
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


def test_a_slot_gets_the_prompt_that_was_meant_for_it() -> None:
    cache = SlotCache(slots=4, context_length=32)
    prompts = states(2, 16)
    cache.fill(index(3, 0, 1), index(1, 0, 1), [prompts])
    cache.aim(index(15, 15, 15, 15), 16)
    keys, _ = cache.update(*states(4, 1), 0)
    for slot, prompt in ((3, 1), (0, 0), (1, 1)):
        assert torch.equal(keys[slot, :, :15], prompts[0][prompt, :, :15])


def test_growing_and_moving_keep_what_was_written() -> None:
    cache = SlotCache(slots=4, context_length=100)
    prompts = states(2, 16)
    cache.fill(index(0, 1), index(0, 1), [prompts])
    cache.aim(index(16, 16), 48)
    new = states(2, 1, seed=1)
    cache.update(*new, 0)
    cache.move(index(1), index(2))
    cache.aim(index(17, 17, 17), 48)
    _, values = cache.update(*states(3, 1), 0)
    assert torch.equal(values[2, :, :16], prompts[1][1])
    assert torch.equal(values[2, :, 16], new[1][1, :, 0])
    assert torch.equal(values[0, :, :16], prompts[1][0])
    assert not values[:, :, 18:].any()


def test_memory_grows_by_doubling_and_never_past_the_context() -> None:
    cache = SlotCache(slots=1, context_length=40)
    cache.fill(index(0), index(0), [states(1, 16)])
    sizes = []
    for length in (16, 32, 48):
        cache.aim(index(0), length)
        sizes.append(cache.get_max_length())
    assert sizes == [16, 32, 48]  # 48 is the context of 40 in whole buckets.


def test_decoding_over_slots_gives_the_logits_of_a_dynamic_cache() -> None:
    model = tiny_model()
    prompts, tokens = ([3, 4, 5], [6, 7, 8, 9, 10]), [11, 12, 13]
    slots = SlotCache(slots=2, context_length=64)
    with torch.inference_mode():
        dynamic = [DynamicCache(), DynamicCache()]
        for slot, prompt in enumerate(prompts):
            model(input_ids=torch.tensor([prompt]), past_key_values=dynamic[slot], use_cache=True)
            slots.fill(index(slot), index(0), [(layer.keys, layer.values) for layer in dynamic[slot].layers])
        for t, token in enumerate(tokens):
            positions = index(3 + t, 5 + t)
            slots.aim(positions, POSITION_BUCKET)
            seen = torch.arange(POSITION_BUCKET) <= positions[:, None]
            got = model(
                input_ids=torch.tensor([[token], [token]]),
                position_ids=positions[:, None],
                attention_mask=torch.where(seen, 0.0, -torch.inf)[:, None, None],
                past_key_values=slots,
                use_cache=True,
            ).logits
            expected = torch.cat(
                [model(torch.tensor([[token]]), past_key_values=c, use_cache=True).logits for c in dynamic]
            )
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
