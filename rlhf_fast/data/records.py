"""Records in and out: JSON Lines in the shapes that people already have, checked before any work starts.

Demonstrations are `{"prompt", "completion"}` or `{"messages": [...]}`; comparisons `{"prompt", "chosen", "rejected"}`,
where each is a string or a message list, or two whole transcripts of the HH-RLHF form without a prompt; prompts
`{"prompt"}`. A path (`.jsonl`, `.jsonl.gz`), a `datasets.Dataset` or a list of dicts all work.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rlhf_fast.data.chat import Message, Prompt

Source = str | Path | Iterable[dict[str, Any]]
_TURN = re.compile(r"\n\n(Human|Assistant): ?")


class RecordError(ValueError):
    """A row that cannot be used; the message names the file, the line and what is wrong."""


@dataclass(frozen=True)
class PromptRecord:
    prompt: Prompt
    category: str = ""
    name: str = ""  # where it came from, for messages: "prompts.jsonl line 3"


@dataclass(frozen=True)
class Demonstration:
    prompt: Prompt
    completion: str
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
    name: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The row as it stands in a comparisons file."""
        row: dict[str, Any] = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        optional = {"margin": self.margin, "annotator": self.annotator, "category": self.category}
        row.update({key: value for key, value in optional.items() if value})
        if self.ratings:
            row["ratings"] = self.ratings
        return row


def read_prompts(source: Source, split: str | None = None) -> list[PromptRecord]:
    """Prompts, optionally only the rows whose `split` is the one asked for."""
    rows = _rows(source)
    if split is not None:
        rows = [(name, row) for name, row in rows if row.get("split") == split]
    return _not_empty(source, [PromptRecord(_prompt(row, name), row.get("category", ""), name) for name, row in rows])


def read_demonstrations(source: Source) -> list[Demonstration]:
    return _not_empty(source, [_demonstration(row, name) for name, row in _rows(source)])


def read_comparisons(source: Source) -> list[Comparison]:
    return _not_empty(source, [_comparison(row, name) for name, row in _rows(source)])


def _rows(source: Source) -> list[tuple[str, dict[str, Any]]]:
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
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                name = f"{path} line {number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise RecordError(f"{name}: not JSON: {error.msg} at column {error.colno}") from error
                if not isinstance(row, dict):
                    raise RecordError(f"{name}: expected an object {{...}}, got {type(row).__name__}")
                rows.append((name, row))
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise RecordError(f"{path}: not readable as UTF-8 text: {error}") from error
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error
    return rows


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def _not_empty(source: Source, records: list[Any]) -> list[Any]:
    if not records:
        where = source if isinstance(source, str | os.PathLike) else "the list"
        raise RecordError(f"{where}: no rows; expected at least one")
    return records


def _demonstration(row: dict[str, Any], name: str) -> Demonstration:
    if "messages" in row:
        messages = _messages(row["messages"], "messages", name)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise RecordError(f"{name}: messages should end with an assistant's answer to something")
        return Demonstration(messages[:-1], _text(messages[-1]["content"], "the assistant's last message", name), name)
    return Demonstration(_prompt(row, name), _text(_get(row, "completion", name), "completion", name), name)


def _comparison(row: dict[str, Any], name: str) -> Comparison:
    if "prompt" not in row:
        row = {**row, **_from_transcripts(row, name)}
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or margin != margin:
        raise RecordError(f"{name}: margin should be a number, got {margin!r}")
    return Comparison(
        prompt=_prompt(row, name),
        chosen=_text(_get(row, "chosen", name), "chosen", name),
        rejected=_text(_get(row, "rejected", name), "rejected", name),
        margin=float(margin),
        annotator=str(row.get("annotator", "")),
        category=str(row.get("category", "")),
        ratings=row.get("ratings") or {},
        name=name,
    )


def _from_transcripts(row: dict[str, Any], name: str) -> dict[str, Any]:
    """Two HH-RLHF transcripts: the turns they share are the prompt, their last answers are compared."""
    chosen, rejected = (_turns(_get(row, key, name), key, name) for key in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant" or shared == 0:
        raise RecordError(f"{name}: chosen and rejected do not share a beginning that ends with the human's turn")
    # A few transcripts differ before their last turn; what follows the first difference is the response as a whole.
    return {
        "prompt": chosen[:shared],
        "chosen": "\n\n".join(turn["content"] for turn in chosen[shared:]),
        "rejected": "\n\n".join(turn["content"] for turn in rejected[shared:]),
    }


def _turns(text: Any, key: str, name: str) -> list[Message]:
    if not isinstance(text, str) or not _TURN.match(text):
        raise RecordError(f'{name}: there is no "prompt", so {key} should be a transcript that begins "\\n\\nHuman:"')
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
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _text(value: Any, key: str, name: str) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")  # a response as a list of one message, as TRL writes it
    if not isinstance(value, str):
        raise RecordError(f"{name}: {key} should be text, got {type(value).__name__}")
    if not value.strip():
        raise RecordError(f"{name}: {key} is empty")
    return value


def _get(row: dict[str, Any], key: str, name: str) -> Any:
    if key not in row:
        raise RecordError(f"{name}: {key!r} is missing; the row has {', '.join(map(repr, row)) or 'nothing'}")
    return row[key]
