from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf_fast.data.tokenize import decode_response, tokenize_example, tokenize_prompt
from rlhf_fast.models.byte_tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, byte_tokenizer

TOKENIZER = byte_tokenizer()


@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"])).filter(lambda s: not any(t in s for t in SPECIAL_TOKENS))
)
def test_any_text_comes_back_unchanged_one_token_for_each_byte(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert all(4 <= token < VOCAB_SIZE for token in ids)
    assert decode_response(TOKENIZER, ids) == text


def test_special_tokens_have_the_first_ids_and_padding_is_not_the_end() -> None:
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id) == (0, 1)
    assert len(TOKENIZER) == VOCAB_SIZE


def test_a_chat_shows_its_turns_and_a_response_ends_with_the_end_token() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    a, b, c = (TOKENIZER(letter)["input_ids"][0] for letter in "abc")
    assert tokenize_prompt(TOKENIZER, chat) == (2, a, 3, b, 1, 2, c, 3)
    assert tokenize_example(TOKENIZER, "a", "b").response == (b, 1)
    assert decode_response(TOKENIZER, [b, 1]) == "b"


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.chat_template == TOKENIZER.chat_template
    assert (loaded.pad_token, loaded.eos_token) == ("<pad>", "<eos>")
    assert tokenize_prompt(loaded, "Grüße, 世界 \n") == tokenize_prompt(TOKENIZER, "Grüße, 世界 \n")
