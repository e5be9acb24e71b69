"""Cheap signs of degenerate text: replies that repeat themselves, and replies that repeat each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

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


def set_repetition(texts: Sequence[str], n: int = 4) -> float:
    """Share of the word n-grams of `texts` that more than a tenth of the other texts also hold: 0 none, 1 all.

    Each text counts each of its n-grams once, so a loop inside one text is not seen here (`repetition` sees it). The
    n-grams of all texts are then pooled, so that a long text weighs more. Among up to ten texts one other holder is
    enough. Fewer than two texts, or none of n words, give 0.0.

    Pass one text per prompt: samples of one prompt share phrases for the good reason that they answer one question.

    Raises:
        ValueError: when n is below 1.
    """
    distinct = [set(_ngrams(text, n)) for text in texts]
    holders = Counter(gram for grams in distinct for gram in grams)  # n-gram -> number of texts that hold it
    total = sum(holders.values())
    # Whole numbers: 0.1 * others is rounded, and a tenth exactly must not count as more than a tenth.
    shared = sum(count for count in holders.values() if 10 * (count - 1) > len(texts) - 1)
    return shared / total if total else 0.0


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    if n < 1:
        raise ValueError(f"n: {n} came; an n-gram has at least 1 word")
    found = words(text)
    return [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]
