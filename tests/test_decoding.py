import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from distrl.decoding import _choose, sample_texts
from distrl.models import TinyArchitecture, load_model, make_tiny_model
from distrl.tokenizer import character_tokenizer

TOKENIZER = character_tokenizer("0123>")
SMALL = TinyArchitecture(hidden_size=16, layers=2, heads=2, intermediate_size=24, context_length=32)
PROMPTS = ["12>", "3>", "0213>", "1>", "31>", "2>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    directory = tmp_path_factory.mktemp("model")
    make_tiny_model(directory, TOKENIZER, seed=0, architecture=SMALL)
    model = load_model(directory, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # Else every distribution is nearly uniform and temperature changes nothing.
    return model


def _noise(rows: int, tokens: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random((rows, tokens))


def _slowly(model: PreTrainedModel, prompt: str, noise: NDArray[np.float64], temperature: float) -> str:
    """One token at a time from the whole text, without a cache, choosing in numpy."""
    ids = list(TOKENIZER.encode(prompt))
    start = len(ids)
    for u in noise:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            weights = np.exp((logits - logits.max()) / temperature)
            token = int(np.flatnonzero(np.cumsum(weights) / weights.sum() > u)[0])
        if token == TOKENIZER.eos_token_id:
            break
        ids.append(token)
    return str(TOKENIZER.decode(ids[start:], skip_special_tokens=True))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_responses_equal_those_of_a_slow_loop_without_a_cache(model: PreTrainedModel, temperature: float) -> None:
    noise = _noise(len(PROMPTS), 10)
    texts = sample_texts(model, TOKENIZER, PROMPTS, noise, temperature=temperature)
    assert texts == [_slowly(model, p, row, temperature) for p, row in zip(PROMPTS, noise, strict=True)]
    assert len(set(texts)) > 1


def test_a_response_does_not_depend_on_the_other_prompts(model: PreTrainedModel) -> None:
    noise = _noise(len(PROMPTS), 10, seed=1)
    together = sample_texts(model, TOKENIZER, PROMPTS, noise)
    alone = [sample_texts(model, TOKENIZER, [p], noise[[i]])[0] for i, p in enumerate(PROMPTS)]
    assert together == alone


def test_response_ends_at_the_end_of_sequence_or_the_last_noise(model: PreTrainedModel) -> None:
    noise = _noise(200, 5)
    lengths = {len(text) for text in sample_texts(model, TOKENIZER, ["1>"] * 200, noise)}
    assert max(lengths) == 5
    assert min(lengths) < 5


def test_first_token_has_the_models_probability(model: PreTrainedModel) -> None:
    with torch.no_grad():
        p = model(torch.tensor([TOKENIZER.encode("1>")])).logits[0, -1].softmax(-1)[TOKENIZER.encode("2")[0]].item()
    texts = sample_texts(model, TOKENIZER, ["1>"] * 4000, _noise(4000, 1))
    assert texts.count("2") / 4000 == pytest.approx(p, abs=4 * (p * (1 - p) / 4000) ** 0.5)


@pytest.mark.parametrize(
    ("noise", "token"),
    [(0.0, 1), (0.25, 1), (0.5, 2), (float(np.nextafter(1.0, 0.0)), 2)],
)
def test_tokens_without_probability_are_never_chosen(noise: float, token: int) -> None:
    # Tokens 1 and 2 have one half each: 1 owns [0, 0.5), 2 owns [0.5, 1), 0 and 3 own nothing.
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    assert _choose(logits, torch.tensor([noise], dtype=torch.float64), 1.0).tolist() == [token]


def test_no_prompts_give_no_responses(model: PreTrainedModel) -> None:
    assert sample_texts(model, TOKENIZER, [], _noise(0, 3)) == []
