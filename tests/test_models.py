import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from distrl.errors import ConfigError, DataError
from distrl.models import TinyArchitecture, load_model, load_tokenizer, make_tiny_model, save_model
from distrl.tokenizer import character_tokenizer

TOKENIZER = character_tokenizer("0123456789>")
SMALL = TinyArchitecture(hidden_size=16, layers=2, heads=2, intermediate_size=24, context_length=32)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "model", TOKENIZER, seed=0, architecture=SMALL)
    return tmp_path / "model"


def _refused(directory: Path | str) -> str:
    with pytest.raises(DataError) as error:
        load_model(directory, torch.float32)
    return str(error.value)


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_default_model_has_the_parameters_that_its_sizes_imply(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, TOKENIZER, seed=0)
    model = load_model(tmp_path, torch.float32)
    # 13 x 128 tied embeddings; per layer 4 x 128^2 attention, 3 x 128 x 384 feed-forward, 2 x 128 norms, 2 x 32 query
    # and key norms; a last norm of 128.
    expected = 13 * 128 + 4 * (4 * 128**2 + 3 * 128 * 384 + 2 * 128 + 2 * 32) + 128
    assert sum(p.numel() for p in model.parameters()) == expected == 855_040


def test_model_knows_its_tokenizers_special_tokens(directory: Path) -> None:
    config = load_model(directory, torch.float32).config
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (13, 0, 1)
    assert config.bos_token_id is None
    assert config.max_position_embeddings == 32


def test_weights_are_a_function_of_the_seed_alone(tmp_path: Path) -> None:
    for name, seed, noise in (("a", 1, 5), ("b", 1, 6), ("c", 2, 5)):
        torch.manual_seed(noise)
        make_tiny_model(tmp_path / name, TOKENIZER, seed=seed, architecture=SMALL)
    a, b, c = (_tensors(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])


def test_making_a_model_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    make_tiny_model(tmp_path, TOKENIZER, seed=1, architecture=SMALL)
    assert torch.equal(torch.rand(3), expected)


def test_saved_and_loaded_model_computes_the_same(directory: Path, tmp_path: Path) -> None:
    model = load_model(directory, torch.float32)
    save_model(tmp_path / "copy", model, load_tokenizer(directory))
    tokens = torch.tensor([[3, 4, 12, 5]])
    # Second route: transformers by itself.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", local_files_only=True)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load_model(tmp_path / "copy", torch.float32)(tokens).logits)
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


def test_loaded_model_evaluates_in_the_asked_for_precision_with_sdpa(directory: Path) -> None:
    model = load_model(directory, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_any_causal_language_model_loads(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    save_model(tmp_path, GPT2LMHeadModel(config), TOKENIZER)
    assert load_model(tmp_path, torch.float32)(torch.tensor([[2, 3]])).logits.shape == (1, 2, 13)
    assert load_tokenizer(tmp_path).encode("10") == TOKENIZER.encode("10")


def test_loading_prints_nothing(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(directory, torch.float32)
    assert capfd.readouterr() == ("", "")


def test_missing_directory_is_refused_and_never_downloaded() -> None:
    assert _refused("Qwen/Qwen3-0.6B") == (
        "model.path must be a local directory, got 'Qwen/Qwen3-0.6B'; names of a model hub are not downloaded"
    )


def test_messages_name_the_setting_that_was_wrong(tmp_path: Path) -> None:
    for load in (
        lambda: load_model(tmp_path / "x", torch.float32, setting="reference.path"),
        lambda: load_tokenizer(tmp_path / "x", setting="reference.path"),
    ):
        with pytest.raises(DataError) as error:
            load()
        assert str(error.value) == (
            f"reference.path must be a local directory, got '{tmp_path / 'x'}'; names of a model hub are not downloaded"
        )


def test_directory_without_config_is_refused(directory: Path) -> None:
    (directory / "config.json").unlink()
    assert _refused(directory) == (
        f"model.path must be a Hugging Face model directory, got '{directory}' without config.json; point it at the "
        "directory that holds config.json"
    )


def test_directory_without_weights_is_refused(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert _refused(directory) == (
        f"model.path must hold weights (*.safetensors or pytorch_model*.bin), got '{directory}' without any; export "
        "or download the model again"
    )


def test_truncated_weights_are_refused(directory: Path) -> None:
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert _refused(directory).startswith(
        f"model.path must be a causal language model that transformers can load, got '{directory}': SafetensorError: "
    )


def test_missing_parameter_is_refused_instead_of_left_random(directory: Path) -> None:
    tensors = _tensors(directory)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert _refused(directory) == (
        f"model.path must hold every parameter of the model, got '{directory}' whose weights lack 2, the first "
        "model.layers.1.mlp.up_proj.weight; export or download the model again"
    )


def test_misshapen_parameter_is_refused_instead_of_left_random(directory: Path) -> None:
    save_file(
        _tensors(directory) | {"model.norm.weight": torch.zeros(7)},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert _refused(directory) == (
        f"model.path must hold every parameter of the model, got '{directory}' whose weights have another shape for "
        "1, the first model.norm.weight; export or download the model again"
    )


def test_model_that_is_not_a_causal_language_model_is_refused(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "vit"}')
    message = _refused(directory)
    assert message.startswith(
        f"model.path must be a causal language model that transformers can load, got '{directory}': ValueError: "
        "Unrecognized configuration class"
    )
    assert "\n" not in message


def test_broken_config_is_refused(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    assert _refused(directory) == (
        f"model.path must be a causal language model that transformers can load, got '{directory}': OSError: It looks "
        f"like the config file at '{directory / 'config.json'}' is not a valid JSON file."
    )


def test_directory_without_tokenizer_is_refused_instead_of_an_empty_one(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(DataError) as error:
        load_tokenizer(directory)
    assert str(error.value) == (
        "model.path must hold a tokenizer (tokenizer.json or *.model or vocab.* or *.tiktoken), got "
        f"'{directory}' without any; export or download the model again"
    )


def test_broken_tokenizer_is_refused(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(DataError) as error:
        load_tokenizer(directory)
    start = f"model.path must hold a tokenizer that transformers can load, got '{directory}': "
    assert str(error.value).startswith(start)


def test_tokenizer_without_end_of_sequence_is_refused(directory: Path) -> None:
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["eos_token"]
    file.write_text(json.dumps(settings))
    with pytest.raises(DataError) as error:
        load_tokenizer(directory)
    assert str(error.value) == (
        f"model.path must have a tokenizer with an end-of-sequence token, got '{directory}' without one; name it as "
        '"eos_token" in tokenizer_config.json'
    )


def test_heads_of_odd_width_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        TinyArchitecture(hidden_size=36, heads=4)
    assert str(error.value) == (
        "hidden_size must be a multiple of 2 x heads (8), got 36; rotary embeddings need heads of an even width"
    )
