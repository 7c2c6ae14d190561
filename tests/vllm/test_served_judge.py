"""A judge whose model a vLLM server of ours serves."""

import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from distrl.config_sections import PreferenceConfig
from distrl.graders.served import ServedModel
from distrl.preferences import Contestant, make_comparison
from distrl.tasks import Problem

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs these tests")

PROBLEM = Problem.of("Say a number.", "")
ENGINE_ARGS = {"max_model_len": 512, "enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 1 << 26}


def always_says_a(directory: Path) -> str:
    """All logits are equal, so that at temperature 0 the first token comes: the verdict for the first response."""
    words = ["[[A]]", "<unk>", "<eos>", *"abcdefgh"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(directory)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=2,
    )
    model = Qwen3ForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(directory)
    return str(directory)


def test_a_model_served_by_vllm_grades_and_compares_and_its_server_ends(tmp_path: Path) -> None:
    path = always_says_a(tmp_path / "judge")
    config = PreferenceConfig(
        function="served_judge", options={"path": path, "engine_args": ENGINE_ARGS, "max_tokens": 4}
    )
    comparison = make_comparison(config)
    judge = comparison.judge
    assert isinstance(judge, ServedModel)
    try:
        found = comparison.compare(PROBLEM, Contestant("p0.0.0", "three"), Contestant("o0.0.0", "one"))
        # It names whichever comes first: no preference, full disagreement.
        assert (found.forwards, found.backwards) == (1.0, 0.0)
        health = judge._endpoint._url.replace("/v1/chat/completions", "/health")
        assert urllib.request.urlopen(health, timeout=30).status == 200
    finally:
        judge.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(health, timeout=30)
