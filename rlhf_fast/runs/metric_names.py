"""Words for the names of metrics, the same in tables, on pages and at the end of a verb."""

from __future__ import annotations

WORDS = {"heldout": "held-out", "grad": "gradient"}  # of a name's parts, where they are others for a person


def words_of(name: str) -> list[str]:
    """Split a metric's name into words for a person: "heldout_grad_norm" is held-out, gradient, norm."""
    return [WORDS.get(part, part) for part in name.split("_")]


def spoken(name: str) -> str:
    """Write a metric's name for a person."""
    return " ".join(words_of(name))
