"""Models and tokenizers in Hugging Face directories: loading any, making a tiny one.

Nothing is ever downloaded: a path is a local directory or an error.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrl.errors import ConfigError, DataError
from distrl.seeding import Purpose, generator

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class TinyArchitecture:
    """Sizes of a Qwen3 model small enough for a laptop; the default has about 0.85 million parameters."""

    hidden_size: int = 128
    """Width of the residual stream; a multiple of `heads`."""
    layers: int = 4
    heads: int = 4
    """Attention heads, each with its own key and value head."""
    intermediate_size: int = 384
    """Width of the gated feed-forward layers."""
    context_length: int = 256
    """Longest prompt plus response, in tokens."""

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.heads):
            raise ConfigError(
                f"hidden_size must be a multiple of 2 x heads ({2 * self.heads}), got {self.hidden_size}; "
                "rotary embeddings need heads of an even width"
            )


def make_tiny_model(
    directory: Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seed: int,
    architecture: TinyArchitecture | None = None,
) -> None:
    """Writes a randomly initialized Qwen3 model and its tokenizer as a Hugging Face directory.

    Args:
        directory: made where it is missing.
        tokenizer: gives the vocabulary, padding and end-of-sequence tokens.
        seed: of the weights, >= 0; torch's global generator is left as it was.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = architecture or TinyArchitecture()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.hidden_size // size.heads,
        max_position_embeddings=size.context_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(seed, Purpose.MODEL).integers(2**63)))
        model = Qwen3ForCausalLM(config)
    save_model(directory, model, tokenizer)


def save_model(directory: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Writes a model and its tokenizer as one Hugging Face directory, which `load_model` and vLLM read."""
    directory.mkdir(parents=True, exist_ok=True)
    with _quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def load_model(directory: Path | str, dtype: "torch.dtype", *, setting: str = "model.path") -> "PreTrainedModel":
    """A causal language model from a local directory, in evaluation mode, with PyTorch's own attention.

    Args:
        dtype: of the parameters, whatever the files hold.
        setting: dotted name of the config key that the directory came from, for messages.
    Raises:
        DataError: the directory is missing, is not that of a causal language model, or its weights are missing,
            damaged, incomplete or of the wrong shape. No parameter is ever left at a random value.
    """
    path = _model_directory(directory, setting)
    _check_holds(path, "weights", _WEIGHTS, setting)

    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=_attention(path),
                local_files_only=True,
                ignore_mismatched_sizes=True,  # Refused below, with the names.
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise DataError(
            f"{setting} must be a causal language model that transformers can load, got {str(path)!r}: "
            f"{_first_line(error)}"
        ) from error
    model: PreTrainedModel
    model, report = loaded
    missing = sorted(report["missing_keys"])
    misshapen = sorted(name for name, _, _ in report["mismatched_keys"])
    for names, fault in ((missing, "lack"), (misshapen, "have another shape for")):
        if names:
            raise DataError(
                f"{setting} must hold every parameter of the model, got {str(path)!r} whose weights {fault} "
                f"{len(names)}, the first {names[0]}; export or download the model again"
            )
    return model


def model_without_weights(directory: Path | str) -> "PreTrainedModel":
    """The model of a directory on the meta device: names and shapes of its tensors, without their memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(_model_directory(directory, "model.path"), local_files_only=True)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _attention(path: Path) -> str:
    """PyTorch's own attention, or the plain one where scores are capped, which the former cannot do."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(path, local_files_only=True)
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"


def check_model(directory: Path | str, *, setting: str = "model.path") -> int:
    """Looks at a model directory without loading its weights.

    Returns:
        The model's context: the longest prompt plus response, in tokens.
    Raises:
        DataError: the directory is missing, has no weights, or its config names no context.
    """
    path = _model_directory(directory, setting)
    _check_holds(path, "weights", _WEIGHTS, setting)

    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{setting} must hold a config that transformers can load, got {str(path)!r}: {_first_line(error)}"
        ) from error
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int):
        raise DataError(
            f"{setting} must have a config with max_position_embeddings, the model's context in tokens, got "
            f"{str(path)!r} with {length!r}; add it to config.json"
        )
    return length


def vocabulary_size(directory: Path | str) -> int:
    """Tokens that a model knows, by its config; `check_model` has looked at the directory."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(directory, local_files_only=True)
    return int(config.get_text_config().vocab_size)


def load_tokenizer(directory: Path | str, *, setting: str = "model.path") -> "PreTrainedTokenizerBase":
    """The tokenizer of a local model directory.

    Args:
        setting: dotted name of the config key that the directory came from, for messages.
    Raises:
        DataError: there is no tokenizer, or it has no end-of-sequence token, so that no response could end.
    """
    path = _model_directory(directory, setting)
    # Without a vocabulary transformers makes an empty tokenizer of the model's usual class, and says nothing.
    _check_holds(path, "a tokenizer", _VOCABULARIES, setting)

    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(
            f"{setting} must hold a tokenizer that transformers can load, got {str(path)!r}: {_first_line(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{setting} must have a tokenizer with an end-of-sequence token, got {str(path)!r} without one; "
            'name it as "eos_token" in tokenizer_config.json'
        )
    return tokenizer


def _model_directory(directory: Path | str, setting: str) -> Path:
    path = Path(directory)
    if not path.is_dir():
        raise DataError(
            f"{setting} must be a local directory, got {str(directory)!r}; names of a model hub are not downloaded"
        )
    if not (path / "config.json").is_file():
        raise DataError(
            f"{setting} must be a Hugging Face model directory, got {str(path)!r} without config.json; "
            "point it at the directory that holds config.json"
        )
    return path


def _check_holds(path: Path, what: str, patterns: Iterable[str], setting: str) -> None:
    if not any(next(path.glob(pattern), None) for pattern in patterns):
        raise DataError(
            f"{setting} must hold {what} ({' or '.join(patterns)}), got {str(path)!r} without any; "
            "export or download the model again"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back transformers' progress bars and reports: what matters in them is raised."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
