"""Cheap signs of degenerate text: replies that repeat themselves."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+(?:['’]\w+)*")


def words(text: str) -> list[str]:
    """The words of `text` in lower case: runs of letters, digits and underscores, with apostrophes kept inside.

    Punctuation and markup fall away. A script written without spaces gives one word per run of letters.
    """
    return _WORD.findall(text.lower())


def repetition(text: str, n: int = 3) -> float:
    """Share of the word n-grams of `text` that repeat an earlier one in it: 0 for none, near 1 for a loop.

    Overlapping n-grams are counted, so this is 1 - distinct / all. A text with fewer than n + 1 words gives 0.0.
    It rises with length by itself: compare texts of like length.

    Raises:
        ValueError: when n is below 1.
    """
    grams = _ngrams(text, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    if n < 1:
        raise ValueError(f"n: {n} came; an n-gram has at least 1 word")
    tokens = words(text)
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
