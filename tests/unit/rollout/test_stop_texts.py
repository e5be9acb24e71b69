"""Where a stop text ends a response, and what of it is text. The tokens are given: a byte or a piece of text each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_fast import Generator, SamplingParams, models
from rlhf_fast.ops.sample import Samples

Script = Callable[[list[int]], None]
PIECES = ("xbcay", "\u00e9\u20ac.", " end\n", "noono")  # tokens of several characters; all others are single bytes
FACE = "\U0001f600"


@pytest.fixture(scope="module")
def speaker() -> Generator:
    """A model that may say any byte, or one of the pieces."""
    from transformers import LlamaConfig

    from tests.conftest import SMALL

    model, tokenizer = models.load(LlamaConfig(**{**SMALL, "vocab_size": 264}))
    tokenizer.add_tokens(list(PIECES))
    return Generator(model, tokenizer)


@pytest.fixture
def say(speaker: Generator, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`say("text", stop=...)`: what `generate` makes of the text's tokens, and the texts that `stream` shows."""

    def run(text: str | list[int], **settings: Any) -> tuple[Any, list[str]]:
        assert speaker.tokenizer is not None
        ids = speaker.tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else text
        params = SamplingParams(**{"max_new_tokens": len(ids), "ignore_eos": True, **settings})

        def scripted() -> None:
            script = iter(ids)

            def sample(logits: torch.Tensor, *options: Any) -> Samples:
                each = torch.zeros(len(logits))
                return Samples(torch.full((len(logits),), next(script)), each, each + 1, each)

            monkeypatch.setattr("rlhf_fast.ops.sample", sample)

        scripted()
        found = speaker.generate(["q"], params)
        scripted()
        return found, [piece.text for piece in speaker.stream(["q"], params)]

    return run


@pytest.mark.parametrize(
    ("said", "stop", "text", "tokens"),
    [
        ("ab\u20accd", ("\u20ac",), "ab", 5),  # three bytes, a token each
        ("a\u00e9\u20accd", ("\u00e9\u20ac",), "a", 6),
        (f"a{FACE}b", (FACE,), "a", 5),
        (f"{FACE}\U0001f601b", ("\U0001f601",), FACE, 8),  # all bytes alike but the last
        (f"ab{FACE * 5}cd", (FACE * 5,), "ab", 22),  # as long in bytes as a text can be
        (f"ab{FACE * 5}cd", ("z", FACE * 5), "ab", 22),
        (f"{FACE * 4}cd", (FACE * 5,), FACE * 4 + "cd", 18),
        ("a\u0301b", ("\u0301",), "a", 3),  # an accent of its own
        ("ab", ("a",), "", 1),  # at once
        ("\u20acb", ("\u20ac",), "", 3),
        ("ab", ("b",), "a", 2),  # with the last token there may be
        ("a\u20ac", ("\u20ac",), "a", 4),
        ("ab\u20ac", ("\u20acc",), "ab\u20ac", 5),  # begun, not ended
        ("abcd", ("cd", "bc"), "a", 3),  # the first to be complete
        ("abcd", ("bc", "cd"), "a", 3),
        ("abcd", ("abc", "bc"), "", 3),  # both at once: the one that begins first
        ("abcd", ("bc", "abc"), "", 3),
        ("abcd", ("bcd", "c"), "ab", 3),
        ("aaab", ("aab",), "a", 4),  # begun twice
        ("ababac", ("abac",), "ab", 6),
        ("a b\n\nc", ("\n\n",), "a b", 5),
        ("xbcayz", ("ca", "bc", "y"), "x", 1),  # three in one token
        ("xbcayz", ("y", "ca"), "xb", 1),
        ("xbcayz", ("yz",), "xbca", 2),  # begun within a token
        ("axbcayz", ("ax",), "", 2),  # ended within one
        ("\u00e9\u20ac.b", ("\u20ac",), "\u00e9", 1),
        ("a end\nb", (" end",), "a", 2),  # spaces count
        ("a end\nb", ("end",), "a ", 2),
        ("anoono", ("no",), "a", 2),  # twice in one
        ("ABC", ("b",), "ABC", 3),  # and so does the case
    ],
)
def test_a_response_ends_with_the_token_that_completes_a_stop_text_and_its_text_before_it(
    say: Callable[..., Any], said: str, stop: tuple[str, ...], text: str, tokens: int
) -> None:
    found, shown = say(said, stop=stop)
    whole = len(found.sequences[0].response)
    assert (found.texts, whole) == ([text], tokens)
    assert found.finish_reasons == ["stop" if any(one in said for one in stop) else "length"]
    assert shown[-1] == text and all(text.startswith(one) for one in shown), "nothing of it is ever shown"


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("stop", [("bc",), ("c",), ("abc", "c"), ("xyz", "bc")])
def test_a_stop_text_is_no_text_also_where_a_stop_token_or_the_limit_ends_the_response(
    say: Callable[..., Any], speaker: Generator, limited: bool, by_token: bool, stop: tuple[str, ...]
) -> None:
    assert speaker.tokenizer is not None
    settings: dict[str, Any] = {"max_new_tokens": 3 if limited else 4}
    if by_token:
        settings["stop_token_ids"] = tuple(speaker.tokenizer("c", add_special_tokens=False)["input_ids"])
    found, shown = say("abcd", stop=stop, **settings)
    text = "abc"[: min("abc".index(one) for one in stop if one in "abc")]
    assert (found.texts, found.finish_reasons, shown[-1]) == ([text], ["stop"], text)
    assert len(found.sequences[0].response) == 3


def test_without_a_stop_text_the_text_of_a_stop_token_stays(say: Callable[..., Any], speaker: Generator) -> None:
    assert speaker.tokenizer is not None
    ids = tuple(speaker.tokenizer("c", add_special_tokens=False)["input_ids"])
    found, _ = say("abcd", stop=("zz",), stop_token_ids=ids)
    assert (found.texts, found.finish_reasons) == (["abc"], ["stop"])
    found, _ = say("abcd", stop=("zz",), max_new_tokens=3)
    assert (found.texts, found.finish_reasons) == (["abc"], ["length"])


@pytest.mark.parametrize(
    ("said", "stop", "least", "text", "tokens"),
    [
        ("bcxbcy", "bc", 1, "", 2),
        ("bcxbcy", "bc", 2, "bcx", 5),  # the first ends too early
        ("bcxbcy", "bc", 4, "bcx", 5),
        ("bcxbcy", "bc", 5, "bcxbcy", 6),
        ("abc", "bc", 2, "a", 3),  # begins before, ends behind
        ("a\u20acbc", "\u20ac", 3, "a", 4),  # in the middle of a character
        ("a\u20acbc", "\u20ac", 4, "a\u20acbc", 6),
        (f"{FACE}bc", FACE, 2, "", 4),
        (f"{FACE}bcb", "c", 3, f"{FACE}b", 6),
    ],
)
def test_a_stop_text_that_ends_within_the_least_length_does_not_count(
    say: Callable[..., Any], said: str, stop: str, least: int, text: str, tokens: int
) -> None:
    found, shown = say(said, stop=stop, min_new_tokens=least)
    assert (found.texts, len(found.sequences[0].response), shown[-1]) == ([text], tokens, text)


def test_special_tokens_within_a_stop_text_are_no_text(say: Callable[..., Any], speaker: Generator) -> None:
    assert speaker.tokenizer is not None
    a, b, c = speaker.tokenizer("abc", add_special_tokens=False)["input_ids"]
    end = speaker.tokenizer.eos_token_id
    for between in (1, 40):
        found, shown = say([a, b, *[end] * between, c, a], stop="bc")
        assert (found.texts, found.finish_reasons, shown[-1]) == (["a"], ["stop"], "a")
        assert len(found.sequences[0].response) == 3 + between
