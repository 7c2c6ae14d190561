"""A tokenizer of single characters, for tasks whose models are trained from nothing."""

from typing import TYPE_CHECKING

from distrl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"


def character_tokenizer(alphabet: str) -> "PreTrainedTokenizerFast":
    """A Hugging Face tokenizer with one token per character, a padding and an end-of-sequence token.

    Token ids are 0 for padding, 1 for the end, then the characters in the alphabet's order. Text decodes back
    exactly, whitespace and a literal "<eos>" included. A character outside the alphabet raises (there is no unknown
    token), so that no prompt is ever shortened in silence. Saved with `save_pretrained`, it loads with
    `AutoTokenizer`.

    Raises:
        ConfigError: the alphabet is empty or has a character twice.
    """
    repeated = sorted({c for c in alphabet if alphabet.count(c) > 1})
    if not alphabet or repeated:
        raise ConfigError(
            f"alphabet must have at least one character and none twice, got {alphabet!r}"
            + (f" with {''.join(repeated)!r} repeated" if repeated else "")
            + "; pass each character once"
        )

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((PAD, EOS, *alphabet))}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    # The default decoder puts spaces between tokens.
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        # Else the text "<eos>" in a prompt would end the sequence.
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
