"""Records in and out: JSON Lines in the shapes that people already have, checked before any work starts.

Demonstrations are `{"prompt", "completion"}` or `{"messages": [...]}`, of any number of turns; comparisons
`{"prompt", "chosen", "rejected"}`, where each is a string or a message list, or without a prompt two whole
conversations (message lists or transcripts of the HH-RLHF form), with what docs/reward.md lists besides; prompts
`{"prompt"}`, whose further columns are kept for reward functions. Any of them may bring `tools` and
`chat_template_kwargs`. A path (`.jsonl`, `.jsonl.gz`), a `datasets.Dataset` or a list of dicts all work.

A message has a role and a content, as text or as a list of parts that are text, which are joined; an assistant's may
have `tool_calls` and a thought (`reasoning_content`, `thinking` or `reasoning`), then the content may be null, and
`weight: 0`, then it is not learned. What else it has is left for the chat template to read.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from rlhf_fast.data.templates import Message, Prompt

Tools = list[dict[str, Any]]
Source = str | Path | Iterable[dict[str, Any]]
OPTIONAL_COLUMNS = ("tools", "chat_template_kwargs")  # of any row: what its chat template reads besides messages
_TURN = re.compile(r"\n\n(Human|Assistant): ?")
MORE_THAN_TEXT = {"tool_calls", "reasoning_content"}  # what an assistant's message may have besides its content
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # what a thought is called


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
    tools: Tools | None = field(default=None, hash=False)  # as JSON schemas
    template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)  # the row's own


@dataclass(frozen=True)
class Demonstration:
    prompt: Prompt
    completion: str | list[Message]  # the answer, or several turns that begin and end with the assistant's
    name: str = ""
    tools: Tools | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


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
    messages: tuple[Message, Message] | None = None  # chosen and rejected, where either is more than text
    tools: Tools | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> tuple[str | list[Message], str | list[Message]]:
        """(chosen, rejected) with all that they are, as text or as a list of one message."""
        if self.messages is None:
            return self.chosen, self.rejected
        chosen, rejected = self.messages
        return [chosen], [rejected]

    def as_dict(self) -> dict[str, Any]:
        """The row as it stands in a comparisons file."""
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


def read_prompts(source: Source | Sequence[PromptRecord], split: str | None = None) -> list[PromptRecord]:
    """Prompts, optionally only the rows whose `split` is the one asked for. Records that were read go through."""
    if _were_read(source, PromptRecord):
        return list(cast(Sequence[PromptRecord], source))
    if isinstance(source, list | tuple):  # what a generator takes for a prompt is one here, too
        source = [{"prompt": row} if isinstance(row, str | list) else row for row in source]
    rows = _not_empty(source, _rows(source))
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
    return _not_empty(source, [_demonstration(row, name) for name, row in _rows(source)])


def read_comparisons(source: Source | Sequence[Comparison]) -> list[Comparison]:
    if _were_read(source, Comparison):
        return list(cast(Sequence[Comparison], source))
    return _not_empty(source, [_comparison(row, name) for name, row in _rows(source)])


def read_record(row: dict[str, Any], name: str = "the record") -> PromptRecord | Demonstration | Comparison:
    """One row of any kind, told by its keys."""
    if "chosen" in row or "rejected" in row:
        return _comparison(row, name)
    if "messages" in row or "completion" in row:
        return _demonstration(row, name)
    if "prompt" in row:
        return _prompt_record(row, name)
    raise RecordError(
        f"{name}: the row has {', '.join(map(repr, row)) or 'nothing'}; expected messages, a prompt, a prompt with a "
        "completion, or chosen and rejected"
    )


def scan_rows(source: Source) -> Iterator[tuple[int, str, dict[str, Any] | RecordError]]:
    """(number, name, row) of every row in turn; in place of one that cannot be read what is wrong with it.

    Raises:
        RecordError: the file cannot be read at all.
    """
    if not isinstance(source, str | os.PathLike):
        for number, row in enumerate(source):
            name = f"row {number}"
            wrong = RecordError(f"{name}: expected a dict, got {type(row).__name__}")
            yield number, name, row if isinstance(row, dict) else wrong
        return
    number = 0
    try:
        with _open(Path(source)) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    name = f"{source} line {number}"
                    try:
                        yield number, name, _row(line, name)
                    except RecordError as error:
                        yield number, name, error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        name = f"{source} line {number + 1}"
        yield number + 1, name, RecordError(f"{name}: not readable as gzip: {error}")
    except OSError as error:
        raise RecordError(f"{source}: cannot be read: {error.strerror or error}") from error


def count_rows(source: Source) -> int:
    """How many rows there are, without reading what is in them; 0 if that cannot be said."""
    if isinstance(source, str | os.PathLike):
        try:
            with _open(Path(source)) as file:
                return sum(1 for line in file if line.strip())
        except (OSError, EOFError, zlib.error):
            return 0
    return len(source) if isinstance(source, Sized) else 0


def user_text(prompt: Prompt) -> str:
    """What the user wrote: of a message list, the user's turns alone."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(message.get("content") or "" for message in prompt if message["role"] == "user")


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text, for people to read."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message_text(message)}" for message in prompt)


def message_text(message: Message) -> str:
    """All that a message says, for people to read."""
    thought = message.get("reasoning_content")
    calls = [call["function"] for call in message.get("tool_calls") or []]
    said = [f"({thought})" if thought else "", message.get("content") or ""]
    said += [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
    return "\n".join(part for part in said if part)


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


def _prompt_record(row: dict[str, Any], name: str) -> PromptRecord:
    prompt, category = _prompt(row, name), _label(row, "category", name)
    return PromptRecord(prompt, category, name, _columns(row), *_of_template(row, name))


def _demonstration(row: dict[str, Any], name: str) -> Demonstration:
    if "messages" not in row:
        prompt, completion = _prompt(row, name), _completion(_get(row, "completion", name), name)
    else:
        messages = _messages(row["messages"], "messages", name)
        if messages[-1]["role"] != "assistant":
            raise RecordError(f"{name}: messages should end with an assistant's answer to something")
        # What the assistant says before anybody else answers nothing.
        roles = [message["role"] for message in messages]
        first = next((i for i in range(1, len(roles)) if roles[i - 1] != "assistant" == roles[i]), None)
        if first is None:
            raise RecordError(f"{name}: messages should end with an assistant's answer to something")
        prompt, completion = messages[:first], _completion(messages[first:], name)
    if isinstance(completion, list) and not any(is_learned(message) for message in completion):
        raise RecordError(f"{name}: every assistant's message has weight 0, so that nothing is learned")
    return Demonstration(prompt, completion, name, *_of_template(row, name))


def is_learned(message: Message) -> bool:
    """Whether it is an answer to be learned, in a completion."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _of_template(row: dict[str, Any], name: str) -> tuple[Tools | None, dict[str, Any]]:
    """(tools, chat_template_kwargs) of a row; both may be JSON in a text, as tables hold them."""
    tools, kwargs = (_from_text(row.get(key), key, name) for key in OPTIONAL_COLUMNS)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RecordError(f"{name}: tools should be a list of JSON schemas {{...}}, got {reprlib.repr(tools)}")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RecordError(f"{name}: chat_template_kwargs should be an object {{...}}, got {reprlib.repr(kwargs)}")
    return tools or None, kwargs or {}


def _from_text(value: Any, key: str, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{name}: {key} is text, but not JSON: {reprlib.repr(value)}") from error


def _comparison(row: dict[str, Any], name: str) -> Comparison:
    messages = None
    if "prompt" in row:
        prompt = _prompt(row, name)
        answers = [_response(_get(row, key, name), key, name) for key in ("chosen", "rejected")]
        chosen, rejected = (message_text(answer) for answer in answers)
        if any(answer.keys() & MORE_THAN_TEXT for answer in answers):
            messages = (answers[0], answers[1])
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
    labels = (annotator, category, ratings, confidence, split, name)
    return Comparison(prompt, chosen, rejected, float(margin), *labels, messages, *_of_template(row, name))


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
    answers = [turns[shared:] for turns in (chosen, rejected)]
    if any(turn.keys() & MORE_THAN_TEXT for turns in answers for turn in turns):
        raise RecordError(
            f"{name}: chosen and rejected end in tool calls or thoughts, which are compared behind a prompt of their "
            'own; give the shared messages as "prompt", and one assistant\'s message each as chosen and rejected'
        )
    said = ("\n\n".join(turn["content"] for turn in turns) for turns in answers)
    return _messages(chosen[:shared], "the prompt", name), *said  # type: ignore[return-value]


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
    return [_message(message, key, name) for message in value]


def _message(message: Any, key: str, name: str) -> Message:
    """A message as templates are given it: `content` is text or None, a thought is called `reasoning_content`, and the
    arguments of calls are objects."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RecordError(f'{name}: a message of {key} should be {{"role": ..., "content": ...}}')
    where = f"the content of a message of {key}"
    found = {k: v for k, v in message.items() if v is not None and k not in (*_THOUGHTS, "content", "tool_calls")}
    _unicode(message["role"], f"the role of a message of {key}", name)
    _unicode(json.dumps(found, ensure_ascii=False, default=str), f"a message of {key}", name)
    if found.get("weight", 1) not in (0, 1):
        raise RecordError(f"{name}: the weight of a message should be 0 or 1, got {reprlib.repr(found['weight'])}")
    thought = next((message[k] for k in _THOUGHTS if message.get(k)), None)
    calls = message.get("tool_calls")
    content = message.get("content")
    if message["role"] == "assistant" and (thought or calls):
        found["content"] = _unicode(_joined(content, where, name), where, name) if content else None
    elif message["role"] == "tool":
        found["content"] = _unicode(_joined(content, where, name), where, name)  # of a tool that says nothing, empty
    else:
        found["content"] = _text(_joined(content, where, name), where, name)
    if thought:
        found["reasoning_content"] = _text(thought, f"the thought of a message of {key}", name)
    if calls:
        found["tool_calls"] = _calls(calls, key, name)
    return found


def _joined(content: Any, where: str, name: str) -> str:
    """A list of parts as their text."""
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise RecordError(f"{name}: {where} should be text, got {type(content).__name__}")
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type", "unknown") if isinstance(part, dict) else type(part).__name__
            raise RecordError(f"{name}: {where} has a part of type {str(kind)!r:.40}; only text can be read")
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any, key: str, name: str) -> list[dict[str, Any]]:
    """`[{"type": "function", "function": {"name", "arguments"}}]`, also from calls without that envelope."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        arguments = function.get("arguments", {}) if isinstance(function, dict) else None
        if isinstance(arguments, str):
            arguments = _from_text(arguments or "{}", "the arguments of a call", name)
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not isinstance(arguments, dict)
        ):
            raise RecordError(
                f'{name}: a call of {key} should be {{"function": {{"name": ..., "arguments": {{...}}}}}}, got '
                f"{reprlib.repr(call)}"
            )
        outer = {k: v for k, v in call.items() if k not in ("function", "name", "arguments")}
        rest = {k: v for k, v in function.items() if k not in outer}
        found.append({"type": "function", **outer, "function": {**rest, "arguments": arguments}})
    _unicode(json.dumps(found, ensure_ascii=False), f"a call of {key}", name)
    return found


def _columns(row: dict[str, Any]) -> Columns:
    """All but the prompt, sorted: the order in which a row names its columns says nothing."""
    return Columns({key: row[key] for key in sorted(key for key in row if isinstance(key, str)) if key != "prompt"})


def _response(value: Any, key: str, name: str) -> Message:
    """An assistant's message, from text or from a list of one message as TRL writes it."""
    if not isinstance(value, list):
        return {"role": "assistant", "content": _text(value, key, name)}
    messages = _messages(value, key, name)
    if [message["role"] for message in messages] != ["assistant"]:
        raise RecordError(f"{name}: {key} should be text or a list of one assistant's message")
    return messages[0]


def _completion(value: Any, name: str) -> str | list[Message]:
    """An answer as text or as a list of one message, or several turns."""
    if not isinstance(value, list):
        return _text(value, "completion", name)
    messages = _messages(value, "completion", name)
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise RecordError(f"{name}: completion should be text, or messages that begin and end with the assistant's")
    alone = len(messages) == 1 and not messages[0].keys() & {*MORE_THAN_TEXT, "weight"}
    return str(messages[0]["content"]) if alone else messages


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
