"""Repetition within a text and between texts, on texts whose n-grams can be counted by hand."""

from __future__ import annotations

import pytest

from rlhf_fast.data.text_metrics import repetition, words


def test_words_drop_case_and_punctuation_and_keep_apostrophes() -> None:
    assert words("Don't *stop*, it’s 9:30 – Straße!") == ["don't", "stop", "it’s", "9", "30", "straße"]
    assert words(" ... \n") == []


def test_repetition_of_hand_counted_texts() -> None:
    assert repetition("one two three four five six") == 0.0
    # 7 three-grams, of which abc, bca, cab are distinct.
    assert repetition("a b c a b c a b c") == pytest.approx(4 / 7)
    assert repetition("A b, c. a B c!") == pytest.approx(1 / 4)
    assert repetition("no " * 100) == pytest.approx(97 / 98)
    assert repetition("to be or not to be", n=2) == pytest.approx(1 / 5)


@pytest.mark.parametrize("text", ["", "one", "one two", "one two three", "!!! ???"])
def test_short_texts_do_not_repeat(text: str) -> None:
    assert repetition(text) == 0.0


def test_an_n_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="n: 0"):
        repetition("a b", n=0)
