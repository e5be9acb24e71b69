"""Repetition within a text and between texts, on texts whose n-grams can be counted by hand."""

from __future__ import annotations

import pytest

from rlhf_fast.data.text_metrics import repetition, set_repetition, words


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


def test_a_shared_template_is_seen_and_different_texts_are_not() -> None:
    different = [f"t{row}a t{row}b t{row}c t{row}d t{row}e" for row in range(20)]
    assert set_repetition(different) == 0.0
    assert set_repetition(["the very same five words"] * 20) == 1.0
    # Each text: 1 shared four-gram, 4 that span into its own words or are its own.
    template = [f"great question my friend w{row} x{row} y{row} z{row}" for row in range(20)]
    assert set_repetition(template) == pytest.approx(1 / 5)


def test_more_than_a_tenth_of_the_others_is_needed() -> None:
    own = [f"p{row} q{row} r{row} s{row}" for row in range(21)]
    # Two holders among the 20 others are a tenth exactly, which is not more than a tenth; three are.
    assert set_repetition(["a b c d"] * 3 + own[3:]) == 0.0
    assert set_repetition(["a b c d"] * 4 + own[4:]) == pytest.approx(4 / 21)


def test_a_loop_inside_one_text_is_not_sharing() -> None:
    assert set_repetition(["go go go go go go go go", "a b c d e"]) == 0.0


@pytest.mark.parametrize("texts", [[], ["only one text with words"], ["", ""], ["too short", "too short"]])
def test_sets_without_a_second_text_share_nothing(texts: list[str]) -> None:
    assert set_repetition(texts) == 0.0


def test_an_n_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="n: 0"):
        repetition("a b", n=0)
    with pytest.raises(ValueError, match="n: 0"):
        set_repetition(["a b"], n=0)
