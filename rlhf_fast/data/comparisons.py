"""Comparisons: a prompt and two answers of which people chose one, from all forms that people write them in."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass, field
from typing import Any

from rlhf_fast.data.messages import (
    MORE_THAN_TEXT,
    Tools,
    get,
    label_of,
    message_text,
    messages_of,
    messages_text,
    present,
    prompt_of,
    template_fields,
    text_of,
    unicode_of,
    with_system,
)
from rlhf_fast.data.rows import RecordError, Row
from rlhf_fast.data.templates import Message, Prompt

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
Answer = str | list[Message]  # text, or turns that begin and end with the assistant's


@dataclass(frozen=True)
class Comparison:
    """Comparison of two answers to a prompt, a row of a comparisons file (docs/reward.md)."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0
    annotator: str = ""
    category: str = ""
    ratings: dict[str, Any] = field(default_factory=dict)  # {"chosen": {criterion: 0..1}, "rejected": {...}}
    confidence: float = 1.0  # how probable it is that chosen is the better, from 0.5 to 1
    split: str = ""  # any but "" and "train" is held out
    name: str = ""
    messages: tuple[list[Message], list[Message]] | None = None  # chosen and rejected, where either is more than a text
    tools: Tools | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    votes: tuple[tuple[str, float], ...] = ()  # that the label is made of: (annotator, above 0 for the chosen answer)

    @property
    def answers(self) -> tuple[Answer, Answer]:
        """Return (chosen, rejected) in full: as text, or as messages where either is more than a text."""
        return (self.chosen, self.rejected) if self.messages is None else self.messages

    def as_dict(self) -> dict[str, Any]:
        """Convert to a row of a comparisons file."""
        chosen, rejected = self.answers
        row: dict[str, Any] = {"prompt": self.prompt, "chosen": chosen, "rejected": rejected}
        optional = {"margin": self.margin, "annotator": self.annotator, "category": self.category, "split": self.split}
        row.update({key: value for key, value in optional.items() if value})
        if self.confidence != 1.0:
            row["confidence"] = self.confidence
        if self.ratings:
            row["ratings"] = self.ratings
        if self.tools:
            row["tools"] = self.tools
        if self.template_kwargs:
            row["chat_template_kwargs"] = self.template_kwargs
        return row


def comparison_of(row: Row, name: str) -> Comparison:
    row = present(row)
    key = "conversations" if "prompt" not in row and "conversations" in row else "prompt"
    prompt = prompt_of(row, name, key) if key in row else None
    given = {side: get(row, side, "comparison", name) for side in ("chosen", "rejected")}
    whole = [_is_conversation(value) for value in given.values()]
    if prompt is not None and whole[0] != whole[1]:
        raise RecordError(
            f"{name}: {'chosen' if whole[0] else 'rejected'} is a whole conversation and the other is not; expected "
            "two of them, or the assistant's answers alone"
        )
    if prompt is None or all(whole):
        prompt, answers = _from_conversations(given, prompt, name)
    else:
        answers = [_answer(value, side, name) for side, value in given.items()]
    texts = [answer if isinstance(answer, str) else _spoken(answer) for answer in answers]
    messages = None
    if any(isinstance(answer, list) for answer in answers):
        chosen, rejected = (
            [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer for answer in answers
        )
        messages = (chosen, rejected)
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) < 1e300:
        raise RecordError(f"{name}: margin should be a number, got {reprlib.repr(margin)}")
    ratings = row.get("ratings") or {}
    if not isinstance(ratings, dict):
        raise RecordError(f"{name}: ratings should be an object {{...}}, got {type(ratings).__name__}")
    annotator, category, split = (label_of(row, key, name) for key in ("annotator", "category", "split"))
    labels = (annotator, category, ratings, _confidence(row, name), split, name)
    prompt = with_system(prompt, row, name)
    fields = template_fields(row, name)
    return Comparison(prompt, texts[0], texts[1], float(margin), *labels, messages, *fields, _votes(row, name))


def _votes(row: Row, name: str) -> tuple[tuple[str, float], ...]:
    """The single votes that `annotate export` writes beside a label, without decisions of seniors."""
    provenance = row.get("provenance")
    votes = provenance.get("votes") if isinstance(provenance, dict) else None
    found = []
    for vote in votes if isinstance(votes, list) else []:
        who, preference = (vote.get(key) if isinstance(vote, dict) else None for key in ("annotator", "preference"))
        if not isinstance(who, str) or isinstance(preference, bool) or not isinstance(preference, int | float):
            raise RecordError(f"{name}: a vote of its provenance needs an annotator and a preference")
        if vote.get("kind") != "adjudication":
            found.append((who, float(preference)))
    return tuple(found)


def _confidence(row: Row, name: str) -> float:
    confidence = row.get("confidence", 1.0)
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0.5 <= confidence <= 1:
        raise RecordError(
            f"{name}: confidence should be the probability that chosen is the better, from 0.5 to 1, got "
            f"{reprlib.repr(confidence)}; map another scale onto that, so that a guess is 0.5"
        )
    return float(confidence)


# One answer ----------------------------------------------------------------------------------------------------------


def _answer(value: Any, key: str, name: str) -> Answer:
    """The assistant's answer: text, a message or messages."""
    if not isinstance(value, list | dict):
        return text_of(value, key, name)
    messages = messages_of(value if isinstance(value, list) else [value], key, name)
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise RecordError(
            f"{name}: {key} should be text, or messages that begin and end with the assistant's, got roles "
            f"{reprlib.repr([message['role'] for message in messages])}"
        )
    return _plain(messages)


def _plain(messages: list[Message]) -> Answer:
    """Reduce one message of nothing but text to that text."""
    alone = len(messages) == 1 and not messages[0].keys() & {*MORE_THAN_TEXT, "weight"}
    return str(messages[0]["content"]) if alone else messages


def _spoken(messages: list[Message]) -> str:
    return message_text(messages[0]) if len(messages) == 1 else messages_text(messages)


# Whole conversations -------------------------------------------------------------------------------------------------


def _is_conversation(value: Any) -> bool:
    """Return whether a value is messages that do not begin with the assistant's, or a transcript."""
    if isinstance(value, str):
        return _TURN.match(value) is not None
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and str(first.get("role") or first.get("from")) not in ("assistant", "gpt")


def _from_conversations(given: dict[str, Any], prompt: Prompt | None, name: str) -> tuple[Prompt, list[Answer]]:
    """Compare two whole conversations: the turns they share are the prompt, and what follows is compared, an answer or
    several turns of which the assistant's are its own.

    An answer may be empty here: such rows are in HH-RLHF, and people did compare them.
    """
    sides = {key: _turns(value, key, name) for key, value in given.items()}
    if prompt is not None:
        for key, turns in sides.items():
            _check_begins(turns, key, prompt, name)
    chosen, rejected = sides.values()
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant" or shared == 0:
        raise RecordError(f"{name}: chosen and rejected do not share a beginning that ends with the human's turn")
    for key, turns in sides.items():
        if turns[-1]["role"] != "assistant":
            raise RecordError(f"{name}: {key} ends with the {turns[-1]['role']}'s turn; expected an assistant's answer")
        if any(not turn.get("content") for turn in turns[shared:-1] if not turn.keys() & MORE_THAN_TEXT):
            raise RecordError(f"{name}: {key} has an empty turn before its last")
    answers = [_plain(turns[shared:]) for turns in sides.values()]
    return messages_of(chosen[:shared], "the prompt", name), answers


def _turns(value: Any, key: str, name: str) -> list[Message]:
    if isinstance(value, list):
        return messages_of(value, key, name)
    if not isinstance(value, str) or not _TURN.match(value):
        raise RecordError(f'{name}: there is no "prompt", so {key} should be messages or begin "\\n\\nHuman:"')
    unicode_of(value, key, name)
    parts = _TURN.split(value)[1:]
    turns: list[Message] = []
    for who, said in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if who == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:  # who speaks twice goes on
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{said.strip()}".strip()
        else:
            turns.append({"role": role, "content": said.strip()})
    return turns


def _check_begins(turns: list[Message], key: str, prompt: Prompt, name: str) -> None:
    """Refuse a conversation that does not begin with the prompt beside it; it may have a system message before."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    skip = int(turns[0]["role"] == "system" != asked[0]["role"])
    begun = [(m["role"], (m.get("content") or "").strip()) for m in turns[skip : skip + len(asked)]]
    if begun != [(m["role"], (m.get("content") or "").strip()) for m in asked]:
        raise RecordError(
            f"{name}: {key} is a whole conversation, but does not begin with the prompt; leave the prompt out, or give "
            "the assistant's answer alone"
        )
