"""Checks on the demo data: client messages (prompts) and written replies to some of them (demonstrations)."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

DEMO_FOLDER = Path(__file__).resolve().parents[2] / "rlhf_fast" / "demo"
PROMPTS_FILE = DEMO_FOLDER / "prompts.jsonl"
DEMONSTRATIONS_FILE = DEMO_FOLDER / "demonstrations.jsonl"

PROMPT_KEYS = ["id", "category", "split", "prompt"]
DEMONSTRATION_KEYS = ["id", "category", "prompt", "completion"]
PROMPT_COUNTS = {
    ("simple", "train"): 64,
    ("complex", "train"): 48,
    ("adversarial", "train"): 39,
    ("off_topic", "train"): 39,
    ("simple", "eval"): 16,
    ("complex", "eval"): 12,
    ("adversarial", "eval"): 11,
    ("off_topic", "eval"): 11,
}
DEMONSTRATION_COUNTS = {"simple": 44, "complex": 34, "adversarial": 26, "off_topic": 26}

FORBIDDEN = {
    "hedging": (
        r"\b(?:maybe|perhaps|possibly|probably|might|could be|I think|I believe|I guess|it depends|hopefully|not sure"
        r"|sort of|kind of|seems|try to)\b"
    ),
    "over-promising": (
        r"\b(?:guarantee\w*|definitely|always|never fails?|best in the world|number one)\b|\b100 ?(?:%|per ?cent\b)"
    ),
    "claimed work": (
        r"\b(?:attached|already)\b|\b(?:I|we)(?: have|'ve) (?:just |now )?(?:\w+ed|sent|done|made|put|built)\b"
    ),
    "self-description": r"\b(?:(?i:assistants?|chat ?bots?|language models?)|AI)\b",
    "American spelling": (
        r"\b(?:color\w*|favorite\w*|center\w*|organiz\w*|apologiz\w*|recogniz\w*|optimiz\w*|customiz\w*"
        r"|gray|catalog|program|inquir\w*|canceled|math|jewelry|behavior)\b"
    ),
    "exclamation mark": r"!",
    "list or markdown": r"[*_#`|<>\n\t]|^\s*(?:-|\d+[.)])\s",
    "placeholder": r"[\[\]{}]",
    "signature": r"\b(?:(?:kind|best|warm) regards|sincerely|yours truly|yours faithfully|cheers)\b",
}

WEEKDAY = r"(?:Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday)"
TIME = re.compile(
    rf"\b(?:today|tonight|tomorrow|this (?:morning|afternoon|evening|week)|{WEEKDAY}|noon|\d{{1,2}}(?::\d\d)? [ap]m"
    r"|within (?:an?|the|one|two|three|\d+) (?:working )?(?:hour|minute|day)s?)\b"
)
COMMITMENT_OR_REQUEST = re.compile(r"\b[Ww]ill\b|\b[Pp]lease\b|\bWould\b.*\bsuit you\b.*\?$")
DECLINE = re.compile(r"\b(?:cannot|do not|not able to|outside what we do)\b")

STOP_WORD_TEXT = (
    "a about after all also am an and any are as at be because been before but by can could did do does for from get"
    " had has have he her his how i if in into is it its just like make me more my need new no not now of off on one"
    " only or our out over please put she should so some tell than that the their them then there they this to too up"
    " us want was we were what when where which who will with would write you your"
)
STOP_WORDS = frozenset(STOP_WORD_TEXT.split())


def read_lines(path: Path) -> list[dict[str, str]]:
    """Read a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


PROMPTS = read_lines(PROMPTS_FILE)
DEMONSTRATIONS = read_lines(DEMONSTRATIONS_FILE)


def words(text: str) -> list[str]:
    """Split a text into lower-case words."""
    return re.findall(r"[a-z0-9']+", text.lower())


def content_words(text: str) -> set[str]:
    """Return the words of a text that carry its subject."""
    return {word for word in words(text) if word not in STOP_WORDS}


def trigrams(text: str) -> set[tuple[str, ...]]:
    """Return the runs of three words of a text."""
    tokens = words(text)
    return set(zip(tokens, tokens[1:], tokens[2:], strict=False))


def jaccard(left: set[Any], right: set[Any]) -> float:
    """Return the size of the intersection of two sets over the size of their union."""
    union = left | right
    return len(left & right) / len(union) if union else 0.0


def sentences(text: str) -> list[str]:
    """Split a text into sentences."""
    return re.split(r"(?<=[.?!])\s+(?=[A-Z0-9])", text)


def next_steps(text: str) -> list[str]:
    """Return the sentences that commit to, or ask for, something at a stated time."""
    return [part for part in sentences(text) if TIME.search(part) and COMMITMENT_OR_REQUEST.search(part)]


@pytest.mark.parametrize("path", [PROMPTS_FILE, DEMONSTRATIONS_FILE], ids=lambda path: path.stem)
def test_files_are_plain_ascii_and_end_with_a_newline(path: Path) -> None:
    """The text decodes as ASCII, the escapes of JSON included, with one object on each line."""
    raw = path.read_bytes()
    assert raw.isascii()
    assert raw.endswith(b"}\n")
    assert b"\r" not in raw
    assert all(value.isascii() for row in read_lines(path) for value in row.values())


def test_every_line_has_the_documented_keys_in_order() -> None:
    """Keys come in the documented order and every value is a trimmed, non-empty string."""
    assert all(list(row) == PROMPT_KEYS for row in PROMPTS)
    assert all(list(row) == DEMONSTRATION_KEYS for row in DEMONSTRATIONS)
    for row in PROMPTS + DEMONSTRATIONS:
        assert all(isinstance(value, str) and value and value == value.strip() for value in row.values()), row


def test_prompt_counts_hold_for_every_category_and_split() -> None:
    """There are 240 prompts, 190 to train on and 50 to evaluate on, in the documented proportions."""
    assert len(PROMPTS) == 240
    assert Counter((row["category"], row["split"]) for row in PROMPTS) == PROMPT_COUNTS


def test_demonstration_counts_hold_for_every_category() -> None:
    """There are 130 demonstrations in the documented proportions."""
    assert len(DEMONSTRATIONS) == 130
    assert Counter(row["category"] for row in DEMONSTRATIONS) == DEMONSTRATION_COUNTS


def test_ids_name_their_category_and_are_unique() -> None:
    """Ids number the prompts of a category from 001 without gaps."""
    for category in DEMONSTRATION_COUNTS:
        ids = [row["id"] for row in PROMPTS if row["category"] == category]
        assert ids == [f"{category}-{number:03d}" for number in range(1, len(ids) + 1)]
    assert len({row["id"] for row in DEMONSTRATIONS}) == len(DEMONSTRATIONS)


def test_prompts_and_completions_are_unique() -> None:
    """No message and no reply appears twice, whatever its case and punctuation."""
    assert len({tuple(words(row["prompt"])) for row in PROMPTS}) == len(PROMPTS)
    assert len({tuple(words(row["completion"])) for row in DEMONSTRATIONS}) == len(DEMONSTRATIONS)


def test_demonstrations_answer_the_exact_text_of_a_prompt() -> None:
    """A demonstration repeats the category and the text of the prompt with its id."""
    by_id = {row["id"]: row for row in PROMPTS}
    for row in DEMONSTRATIONS:
        assert row["prompt"] == by_id[row["id"]]["prompt"]
        assert row["category"] == by_id[row["id"]]["category"]


def test_evaluation_prompts_are_never_demonstrated() -> None:
    """Only prompts of the train split have a demonstration."""
    evaluation = [row for row in PROMPTS if row["split"] == "eval"]
    assert not {row["id"] for row in evaluation} & {row["id"] for row in DEMONSTRATIONS}
    assert not {row["prompt"] for row in evaluation} & {row["prompt"] for row in DEMONSTRATIONS}


def test_evaluation_prompts_are_not_near_copies_of_train_prompts() -> None:
    """Jaccard similarity to every train prompt is below 0.3 over word 3-grams and below 0.6 over content words."""
    train = [row["prompt"] for row in PROMPTS if row["split"] == "train"]
    for row in PROMPTS:
        if row["split"] == "eval":
            for prompt in train:
                assert jaccard(trigrams(row["prompt"]), trigrams(prompt)) < 0.3, (row["prompt"], prompt)
                assert jaccard(content_words(row["prompt"]), content_words(prompt)) < 0.6, (row["prompt"], prompt)


def test_prompts_have_6_to_60_words_and_mostly_10_to_35() -> None:
    """Every prompt has 6 to 60 words, and at least three in four have 10 to 35."""
    lengths = {row["id"]: len(row["prompt"].split()) for row in PROMPTS}
    assert {name: length for name, length in lengths.items() if not 6 <= length <= 60} == {}
    assert sum(10 <= length <= 35 for length in lengths.values()) >= 0.75 * len(lengths)


def test_completions_have_25_to_65_words_and_mostly_at_most_60() -> None:
    """Every completion has 25 to 65 words, and nine in ten have at most 60."""
    lengths = {row["id"]: len(row["completion"].split()) for row in DEMONSTRATIONS}
    assert {name: length for name, length in lengths.items() if not 25 <= length <= 65} == {}
    assert sum(length <= 60 for length in lengths.values()) >= 0.9 * len(lengths)


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_completions_never_break_a_wording_rule(rule: str) -> None:
    """No completion contains a forbidden word or mark."""
    pattern = re.compile(FORBIDDEN[rule], 0 if rule == "self-description" else re.IGNORECASE)
    found = {row["id"]: match.group() for row in DEMONSTRATIONS if (match := pattern.search(row["completion"]))}
    assert found == {}


def test_completions_end_with_a_full_stop_or_a_question_mark() -> None:
    """The last character closes a sentence."""
    assert [row["id"] for row in DEMONSTRATIONS if not row["completion"].endswith((".", "?"))] == []


def test_completions_make_exactly_one_next_step_and_end_on_it() -> None:
    """One sentence, the last, commits to something at a stated time or asks for something concrete."""
    for row in DEMONSTRATIONS:
        steps = next_steps(row["completion"])
        assert steps == sentences(row["completion"])[-1:], (row["id"], steps)


def test_adversarial_and_off_topic_completions_open_with_a_boundary() -> None:
    """The first sentence declines in plain words."""
    rows = [row for row in DEMONSTRATIONS if row["category"] in {"adversarial", "off_topic"}]
    assert [row["id"] for row in rows if not DECLINE.search(sentences(row["completion"])[0])] == []


def test_completions_reuse_the_words_of_the_client() -> None:
    """A completion shares at least two subject words, compared by their first five letters, with its prompt."""

    def stems(text: str) -> set[str]:
        return {word[:5] for word in content_words(text) if len(word) > 2}

    shared = {row["id"]: stems(row["prompt"]) & stems(row["completion"]) for row in DEMONSTRATIONS}
    assert {name: common for name, common in shared.items() if len(common) < 2} == {}
