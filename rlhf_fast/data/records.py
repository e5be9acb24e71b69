"""Records in and out: JSON Lines in the shapes that people already have, checked before any work starts.

Demonstrations are `{"prompt", "completion"}` or `{"messages": [...]}`, of any number of turns; comparisons
`{"prompt", "chosen", "rejected"}`, where each is a string or a message list, or two whole conversations (message lists
or transcripts of the HH-RLHF form; comparisons.py), with what docs/reward.md lists besides; prompts `{"prompt"}`, whose
further columns are kept for reward functions. Any of them may bring `system`, `tools` and `chat_template_kwargs`; a
column that is null counts as absent. A path (`.jsonl`, `.jsonl.gz`, a JSON array), a `datasets.Dataset` or a list of
dicts all work (rows.py).
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from rlhf_fast.data.comparisons import Comparison, comparison_of
from rlhf_fast.data.messages import (
    MORE_THAN_TEXT,
    OPTIONAL_COLUMNS,
    Tools,
    get,
    is_learned,
    kind_of,
    label_of,
    message_text,
    messages_of,
    messages_text,
    present,
    prompt_of,
    template_fields,
    text_of,
    with_system,
)
from rlhf_fast.data.rows import RecordError, Row, Source, rows_of
from rlhf_fast.data.templates import Message, Prompt

__all__ = [
    "OPTIONAL_COLUMNS", "Columns", "Comparison", "Demonstration", "PromptRecord", "RecordError", "Source", "Tools",
    "is_learned", "message_text", "prompt_text", "read_comparisons", "read_demonstrations", "read_prompts",
    "read_record", "user_text",
]  # fmt: skip


class Columns(dict[str, Any]):
    """Further columns of a row. Their repr, by which earlier versions knew a run's data again, is the same in every
    process."""

    def __repr__(self) -> str:
        return re.sub(r" at 0x[0-9a-fA-F]+", "", super().__repr__())


@dataclass(frozen=True)
class PromptRecord:
    """Prompt to answer, with the other columns of its row."""

    prompt: Prompt
    category: str = ""
    name: str = ""  # where it came from, for messages: "prompts.jsonl line 3"
    columns: Columns = field(default_factory=Columns, hash=False)  # all of the row but its prompt, by name
    tools: Tools | None = field(default=None, hash=False)  # as JSON schemas
    template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)  # the row's own


@dataclass(frozen=True)
class Demonstration:
    """Demonstration: a prompt and the answer to learn."""

    prompt: Prompt
    completion: str | list[Message]  # the answer, or several turns that begin and end with the assistant's
    name: str = ""
    tools: Tools | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    split: str = ""  # any but "" and "train" is held out


def read_prompts(source: Source | Sequence[PromptRecord], split: str | None = None) -> list[PromptRecord]:
    """Read prompts, all or those of one `split`. Records that were read already are returned as they are."""
    if _were_read(source, PromptRecord):
        return list(cast(Sequence[PromptRecord], source))
    if isinstance(source, list | tuple):  # what a generator takes for a prompt is one here, too
        source = [{"prompt": row} if isinstance(row, str | list) else row for row in source]
    rows = _not_empty(source, rows_of(source))
    if split is not None:
        rows = [(name, row) for name, row in rows if row.get("split") == split]
        _not_empty(source, rows, f" whose split is {split!r}")
    records = [_prompt_record(row, name) for name, row in rows]
    for name in OPTIONAL_COLUMNS:  # what a reward model asks for where any row has it
        if any(name in record.columns for record in records):
            for record in records:
                record.columns.setdefault(name, None)
    return records


def read_demonstrations(source: Source) -> list[Demonstration]:
    return _not_empty(source, [_demonstration(row, name) for name, row in rows_of(source)])


def read_comparisons(source: Source | Sequence[Comparison]) -> list[Comparison]:
    if _were_read(source, Comparison):
        return list(cast(Sequence[Comparison], source))
    return _not_empty(source, [comparison_of(row, name) for name, row in rows_of(source)])


def read_record(row: Row, name: str = "the record") -> PromptRecord | Demonstration | Comparison:
    """Read one row of any kind, told by its keys."""
    kind = kind_of(present(row))
    if kind == "comparison":
        return comparison_of(row, name)
    if kind == "demonstration":
        return _demonstration(row, name)
    if kind == "prompt":
        return _prompt_record(row, name)
    raise RecordError(
        f"{name}: the row has {', '.join(map(repr, row)) or 'nothing'}; expected messages, a prompt, a prompt with a "
        "completion, or chosen and rejected"
    )


def user_text(prompt: Prompt) -> str:
    """Extract what the user wrote: of a message list, the user's turns alone."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(message.get("content") or "" for message in prompt if message["role"] == "user")


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text, for people to read."""
    return prompt if isinstance(prompt, str) else messages_text(prompt)


def _were_read(source: Any, kind: type) -> bool:
    return isinstance(source, list | tuple) and bool(source) and all(isinstance(row, kind) for row in source)


def _not_empty(source: Any, records: list[Any], which: str = "") -> list[Any]:
    if not records:
        where = source if isinstance(source, str | os.PathLike) else "the list"
        raise RecordError(f"{where}: no rows{which}; expected at least one")
    return records


def _prompt_record(row: Row, name: str) -> PromptRecord:
    given = present(row)
    get(given, "prompt", "prompt", name)
    prompt, category = with_system(prompt_of(given, name), given, name), label_of(row, "category", name)
    return PromptRecord(prompt, category, name, _columns(row), *template_fields(row, name))


def _columns(row: Row) -> Columns:
    """Sort all columns but the prompt: the order in which a row names its columns says nothing."""
    return Columns({key: row[key] for key in sorted(key for key in row if isinstance(key, str)) if key != "prompt"})


def _demonstration(row: Row, name: str) -> Demonstration:
    row = present(row)
    if row.get("label") is False:
        raise RecordError(
            f"{name}: label is false, so that the completion is one that people did not want; leave such rows out, or "
            "pair them with wanted ones as comparisons"
        )
    key = next((key for key in ("messages", "conversations") if key in row), "")
    if not key:
        completion = get(row, "completion", "demonstration", name)
        get(row, "prompt", "demonstration", name)
        prompt, completion = prompt_of(row, name), _completion(completion, name)
    else:
        messages = messages_of(row[key], key, name)
        if messages[-1]["role"] != "assistant":
            raise RecordError(f"{name}: {key} should end with an assistant's answer to something")
        # What the assistant says before anybody else answers nothing.
        roles = [message["role"] for message in messages]
        first = next((i for i in range(1, len(roles)) if roles[i - 1] != "assistant" == roles[i]), None)
        if first is None:
            raise RecordError(f"{name}: {key} should end with an assistant's answer to something")
        prompt, completion = messages[:first], _completion(messages[first:], name)
    if isinstance(completion, list) and not any(is_learned(message) for message in completion):
        raise RecordError(
            f"{name}: every assistant's message has weight 0, so that nothing is learned; leave the row out, or "
            "give one of them weight 1"
        )
    prompt, split = with_system(prompt, row, name), label_of(row, "split", name)
    return Demonstration(prompt, completion, name, *template_fields(row, name), split)


def _completion(value: Any, name: str) -> str | list[Message]:
    """An answer as text or as a list of one message, or several turns."""
    if not isinstance(value, list):
        return text_of(value, "completion", name)
    messages = messages_of(value, "completion", name)
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise RecordError(
            f"{name}: completion should be text, or messages that begin and end with the assistant's, got roles "
            f"{reprlib.repr([message['role'] for message in messages])}"
        )
    alone = len(messages) == 1 and not messages[0].keys() & {*MORE_THAN_TEXT, "weight"}
    return str(messages[0]["content"]) if alone else messages
