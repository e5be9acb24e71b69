"""Records in and out: JSON Lines in the shapes that people already have, checked before any work starts.

Demonstrations are `{"prompt", "completion"}` or `{"messages": [...]}`, of any number of turns; comparisons
`{"prompt", "chosen", "rejected"}`, where each is a string or a message list, or without a prompt two whole
conversations (message lists or transcripts of the HH-RLHF form), with what docs/reward.md lists besides; prompts
`{"prompt"}`, whose further columns are kept for reward functions. A path (`.jsonl`, `.jsonl.gz`), a `datasets.Dataset`
or a list of dicts all work.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import reprlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from rlhf_fast.data.chat import Message, Prompt

Source = str | Path | Iterable[dict[str, Any]]
_TURN = re.compile(r"\n\n(Human|Assistant): ?")


class RecordError(ValueError):
    """A row that cannot be used; the message names the file, the line and what is wrong."""


class Columns(dict[str, Any]):
    """Further columns of a row. Its repr, by which a run knows its data again, is the same in every process."""

    def __repr__(self) -> str:
        return re.sub(r" at 0x[0-9a-fA-F]+", "", super().__repr__())


@dataclass(frozen=True)
class PromptRecord:
    prompt: Prompt
    category: str = ""
    name: str = ""  # where it came from, for messages: "prompts.jsonl line 3"
    columns: Columns = field(default_factory=Columns, hash=False)  # all of the row but its prompt, by name


@dataclass(frozen=True)
class Demonstration:
    prompt: Prompt
    completion: str | list[Message]  # the answer, or several turns that begin and end with the assistant's
    name: str = ""


@dataclass(frozen=True)
class Comparison:
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

    def as_dict(self) -> dict[str, Any]:
        """The row as it stands in a comparisons file."""
        row: dict[str, Any] = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        optional = {"margin": self.margin, "annotator": self.annotator, "category": self.category, "split": self.split}
        row.update({key: value for key, value in optional.items() if value})
        if self.confidence != 1.0:
            row["confidence"] = self.confidence
        if self.ratings:
            row["ratings"] = self.ratings
        return row


def read_prompts(source: Source | Sequence[PromptRecord], split: str | None = None) -> list[PromptRecord]:
    """Prompts, optionally only the rows whose `split` is the one asked for. Records that were read go through."""
    if _were_read(source, PromptRecord):
        return list(cast(Sequence[PromptRecord], source))
    rows = _not_empty(source, _rows(source))
    if split is not None:
        rows = [(name, row) for name, row in rows if row.get("split") == split]
        _not_empty(source, rows, f" whose split is {split!r}")
    return [PromptRecord(_prompt(row, name), _label(row, "category", name), name, _columns(row)) for name, row in rows]


def read_demonstrations(source: Source) -> list[Demonstration]:
    return _not_empty(source, [_demonstration(row, name) for name, row in _rows(source)])


def read_comparisons(source: Source | Sequence[Comparison]) -> list[Comparison]:
    if _were_read(source, Comparison):
        return list(cast(Sequence[Comparison], source))
    return _not_empty(source, [_comparison(row, name) for name, row in _rows(source)])


def _were_read(source: Any, kind: type) -> bool:
    return isinstance(source, list | tuple) and bool(source) and all(isinstance(row, kind) for row in source)


def _rows(source: Any) -> list[tuple[str, dict[str, Any]]]:
    """(name, row) of every row; the name says where it stands."""
    if isinstance(source, str | os.PathLike):
        return _file_rows(Path(source))
    rows = []
    for number, row in enumerate(source):
        if not isinstance(row, dict):
            raise RecordError(f"row {number}: expected a dict, got {type(row).__name__}")
        rows.append((f"row {number}", row))
    return rows


def _file_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    name = f"{path} line {number}"
                    rows.append((name, _row(line, name)))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RecordError(f"{path} line {number + 1}: not readable as gzip: {error}") from error
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error
    return rows


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else open(path, "rb"))


def _row(line: bytes, name: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError(f"{name}: not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise RecordError(f"{name}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise RecordError(f"{name}: not readable as JSON: {error}") from error
    if not isinstance(row, dict):
        raise RecordError(f"{name}: expected an object {{...}}, got {type(row).__name__}")
    return row


def _not_empty(source: Any, records: list[Any], which: str = "") -> list[Any]:
    if not records:
        where = source if isinstance(source, str | os.PathLike) else "the list"
        raise RecordError(f"{where}: no rows{which}; expected at least one")
    return records


def _demonstration(row: dict[str, Any], name: str) -> Demonstration:
    if "messages" not in row:
        return Demonstration(_prompt(row, name), _completion(_get(row, "completion", name), name), name)
    messages = _messages(row["messages"], "messages", name)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise RecordError(f"{name}: messages should end with an assistant's answer to something")
    # What the assistant says before anybody else answers nothing.
    first = next(i for i, message in enumerate(messages) if i and message["role"] == "assistant")
    return Demonstration(messages[:first], _completion(messages[first:], name), name)


def _comparison(row: dict[str, Any], name: str) -> Comparison:
    if "prompt" in row:
        prompt = _prompt(row, name)
        chosen, rejected = (_response(_get(row, key, name), key, name) for key in ("chosen", "rejected"))
    else:
        prompt, chosen, rejected = _from_conversations(row, name)
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) < 1e300:
        raise RecordError(f"{name}: margin should be a number, got {reprlib.repr(margin)}")
    ratings = row.get("ratings") or {}
    if not isinstance(ratings, dict):
        raise RecordError(f"{name}: ratings should be an object {{...}}, got {type(ratings).__name__}")
    annotator, category, split = (_label(row, key, name) for key in ("annotator", "category", "split"))
    confidence = _confidence(row, name)
    return Comparison(prompt, chosen, rejected, float(margin), annotator, category, ratings, confidence, split, name)


def _confidence(row: dict[str, Any], name: str) -> float:
    confidence = row.get("confidence")
    if confidence is None:
        return 1.0
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0.5 <= confidence <= 1:
        raise RecordError(
            f"{name}: confidence should be the probability that chosen is the better, from 0.5 to 1, got "
            f"{reprlib.repr(confidence)}; map another scale onto that, so that a guess is 0.5"
        )
    return float(confidence)


def _from_conversations(row: dict[str, Any], name: str) -> tuple[Prompt, str, str]:
    """Two whole conversations: the turns they share are the prompt, their last answers are compared.

    An answer may be empty here: such rows are in HH-RLHF, and people did compare them.
    """
    chosen, rejected = (_turns(_get(row, key, name), key, name) for key in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant" or shared == 0:
        raise RecordError(f"{name}: chosen and rejected do not share a beginning that ends with the human's turn")
    # A few transcripts differ before their last turn; what follows the first difference is the response as a whole.
    answers = ("\n\n".join(turn["content"] for turn in turns[shared:]) for turns in (chosen, rejected))
    return _messages(chosen[:shared], "the prompt", name), *answers  # type: ignore[return-value]


def _turns(text: Any, key: str, name: str) -> list[Message]:
    if isinstance(text, list):
        return _messages(text, key, name)
    if not isinstance(text, str) or not _TURN.match(text):
        raise RecordError(f'{name}: there is no "prompt", so {key} should be messages or begin "\\n\\nHuman:"')
    _unicode(text, key, name)
    parts = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _prompt(row: dict[str, Any], name: str) -> Prompt:
    prompt = _get(row, "prompt", name)
    if isinstance(prompt, list):
        return _messages(prompt, "prompt", name)
    return _text(prompt, "prompt", name)


def _messages(value: Any, key: str, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RecordError(f"{name}: {key} should be a list of messages, got {type(value).__name__}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RecordError(f'{name}: a message of {key} should be {{"role": ..., "content": ...}}')
        _text(message.get("content"), f"the content of a message of {key}", name)
        _unicode(message["role"], f"the role of a message of {key}", name)
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _columns(row: dict[str, Any]) -> Columns:
    """All but the prompt, sorted: the order in which a row names its columns says nothing."""
    return Columns({key: row[key] for key in sorted(key for key in row if isinstance(key, str)) if key != "prompt"})


def _response(value: Any, key: str, name: str) -> str:
    """Text, or a list of one message as TRL writes it."""
    if not isinstance(value, list):
        return _text(value, key, name)
    messages = _messages(value, key, name)
    if [message["role"] for message in messages] != ["assistant"]:
        raise RecordError(f"{name}: {key} should be text or a list of one assistant's message")
    return str(messages[0]["content"])


def _completion(value: Any, name: str) -> str | list[Message]:
    """An answer as text or as a list of one message, or several turns."""
    if not isinstance(value, list):
        return _text(value, "completion", name)
    messages = _messages(value, "completion", name)
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise RecordError(f"{name}: completion should be text, or messages that begin and end with the assistant's")
    return str(messages[0]["content"]) if len(messages) == 1 else messages


def _text(value: Any, key: str, name: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{name}: {key} should be text, got {type(value).__name__}")
    if not value.strip():
        raise RecordError(f"{name}: {key} is empty")
    return _unicode(value, key, name)


def _unicode(value: str, key: str, name: str) -> str:
    """JSON can spell half a surrogate pair, which no tokenizer and no file takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"{name}: {key} holds half a character ({value[error.start]!a})") from error
    return value


def _label(row: dict[str, Any], key: str, name: str) -> str:
    """A short text such as a category; a whole number is taken as its digits, null and a missing key as empty."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise RecordError(f"{name}: {key} should be text, got {type(value).__name__}")
    return "" if value is None else _unicode(str(value), key, name)


def _get(row: dict[str, Any], key: str, name: str) -> Any:
    if key not in row:
        raise RecordError(f"{name}: {key!r} is missing; the row has {', '.join(map(repr, row)) or 'nothing'}")
    return row[key]
