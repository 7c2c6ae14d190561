from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from distrl.errors import ConfigError
from distrl.models import load_tokenizer
from distrl.tokenizer import character_tokenizer

ALPHABET = "0123456789> \n<eospad/é😀"
TOKENIZER = character_tokenizer(ALPHABET)


def test_ids_are_padding_end_and_the_alphabet_in_order() -> None:
    tokenizer = character_tokenizer("ba>")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 5)
    assert tokenizer.encode("ab>") == [3, 2, 4]
    assert tokenizer.bos_token_id is None


@given(st.text(alphabet=ALPHABET))
def test_text_decodes_back_exactly_with_one_token_per_character(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_are_shown_or_skipped() -> None:
    ids = [*TOKENIZER.encode("12"), 1, 0, 0]
    assert TOKENIZER.decode(ids) == "12<eos><pad><pad>"
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "12"


def test_special_token_written_in_a_prompt_is_only_text() -> None:
    ids = TOKENIZER.encode("<eos>")
    assert len(ids) == 5
    assert TOKENIZER.eos_token_id not in ids


@settings(max_examples=20)
@given(st.text(alphabet=ALPHABET))
def test_saved_tokenizer_is_the_same_tokenizer(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    directory = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(directory)
    loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)


def test_padding_uses_the_padding_token() -> None:
    batch = character_tokenizer("ab")(["ab", "a"], padding=True)
    assert batch["input_ids"] == [[2, 3], [2, 0]]
    assert batch["attention_mask"] == [[1, 1], [1, 0]]


def test_character_outside_the_alphabet_is_an_error_not_a_gap() -> None:
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        character_tokenizer("ab").encode("abc")


def test_repeated_character_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        character_tokenizer("abcab")
    assert str(error.value) == (
        "alphabet must have at least one character and none twice, got 'abcab' with 'ab' repeated; "
        "pass each character once"
    )


def test_empty_alphabet_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        character_tokenizer("")
    assert str(error.value) == (
        "alphabet must have at least one character and none twice, got ''; pass each character once"
    )


def test_load_tokenizer_needs_a_model_directory(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert load_tokenizer(tmp_path).encode("12>") == TOKENIZER.encode("12>")
