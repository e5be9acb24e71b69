"""Text of models and people as text: nothing in it is HTML, and characters that cannot be seen are marked."""

from __future__ import annotations

import unicodedata

from markupsafe import Markup, escape


def shown(text: str) -> Markup:
    """`text` escaped, with a visible mark in place of each zero-width, bidi, control or private character."""
    marks = {ord(one): str(_mark(one)) for one in set(text) if _is_hidden(one)}
    return Markup(str(escape(text)).translate(marks))


def _is_hidden(character: str) -> bool:
    """Whether a reader would not see it, or see what follows it in another order; lines and tabs stay."""
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp") or character in "\u115f\u3164"


def _mark(character: str) -> Markup:
    name = f"U+{ord(character):04X}"
    return Markup('<span class="mark" title="{}">{}</span>').format(
        unicodedata.name(character, "control character"), name
    )
