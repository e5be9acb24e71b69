"""Messages as templates are given them, from what people write, and the other values of a row. Knows no files.

A message has a role and a content, as text or as a list of parts that are text, which are joined; an assistant's may
have `tool_calls` and a thought (`reasoning_content`, `thinking` or `reasoning`), then the content may be null, and
`weight: 0`, then it is not learned. What else it has is left for the chat template to read. `{"from", "value"}`, the
form of ShareGPT, is read alike.
"""

from __future__ import annotations

import json
import reprlib
from typing import Any

from rlhf_fast.data.rows import RecordError, Row
from rlhf_fast.data.templates import Message, Prompt

Tools = list[dict[str, Any]]
OPTIONAL_COLUMNS = ("tools", "chat_template_kwargs")  # of any row: what its chat template reads besides messages
MORE_THAN_TEXT = {"tool_calls", "reasoning_content"}  # what an assistant's message may have besides its content
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # what a thought is called
_SPEAKERS = {  # what ShareGPT's `from` says
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def messages_of(value: Any, key: str, name: str) -> list[Message]:
    """Messages; one of the system's that is null counts as absent."""
    if not isinstance(value, list) or not value:
        raise RecordError(f"{name}: {key} should be a list of messages, got {type(value).__name__}")
    messages = [_message(message, key, name) for message in value if not _is_null(message)]
    if not messages:
        raise RecordError(f"{name}: {key} should be a list of messages, got a null one alone")
    return messages


def _is_null(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "system" and message.get("content") is None


def _message(message: Any, key: str, name: str) -> Message:
    """A message as templates are given it: `content` is text or None, a thought is called `reasoning_content`, and the
    arguments of calls are objects."""
    if isinstance(message, dict) and message.get("role") is None and message.get("from") is not None:
        message = _from_sharegpt(message, key, name)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RecordError(
            f'{name}: a message of {key} should be {{"role": ..., "content": ...}} or {{"from": ..., "value": ...}}, '
            f"got {reprlib.repr(message)}"
        )
    where = f"the content of a message of {key}"
    kept = {k: v for k, v in message.items() if v is not None and k not in (*_THOUGHTS, "content", "tool_calls")}
    unicode_of(message["role"], f"the role of a message of {key}", name)
    unicode_of(json.dumps(kept, ensure_ascii=False, default=str), f"a message of {key}", name)
    if kept.get("weight", 1) not in (0, 1):
        raise RecordError(f"{name}: the weight of a message should be 0 or 1, got {reprlib.repr(kept['weight'])}")
    thought = next((message[k] for k in _THOUGHTS if message.get(k)), None)
    calls = message.get("tool_calls")
    content = message.get("content")
    if message["role"] == "assistant" and (thought or calls):
        kept["content"] = unicode_of(_joined(content, where, name), where, name) if content else None
    elif message["role"] == "tool":
        kept["content"] = unicode_of(_joined(content, where, name), where, name)  # of a tool that says nothing, empty
    else:
        kept["content"] = text_of(_joined(content, where, name), where, name)
    if thought:
        kept["reasoning_content"] = text_of(thought, f"the thought of a message of {key}", name)
    if calls:
        kept["tool_calls"] = _calls(calls, key, name)
    return kept


def _from_sharegpt(message: Message, key: str, name: str) -> Message:
    role = _SPEAKERS.get(str(message["from"]).lower())
    if role is None:
        raise RecordError(
            f"{name}: a message of {key} is from {message['from']!r:.40}; expected one of {', '.join(_SPEAKERS)}"
        )
    rest = {k: v for k, v in message.items() if k not in ("from", "value", "role", "content")}
    return {"role": role, "content": message.get("value"), **rest}


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
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        arguments = function.get("arguments", {}) if isinstance(function, dict) else None
        if isinstance(arguments, str):
            arguments = from_text(arguments or "{}", "the arguments of a call", name)
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
        made.append({"type": "function", **outer, "function": {**rest, "arguments": arguments}})
    unicode_of(json.dumps(made, ensure_ascii=False), f"a call of {key}", name)
    return made


def from_text(value: Any, key: str, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{name}: {key} is text, but not JSON: {reprlib.repr(value)}; expected JSON in it") from error


def text_of(value: Any, key: str, name: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{name}: {key} should be text, got {type(value).__name__}")
    if not value.strip():
        raise RecordError(f"{name}: {key} is empty; expected some text")
    return unicode_of(value, key, name)


def unicode_of(value: str, key: str, name: str) -> str:
    """Require whole characters: JSON can spell half a surrogate pair, which no tokenizer and no file takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"{name}: {key} holds half a character ({value[error.start]!a}); write it whole") from error
    return value


def label_of(row: dict[str, Any], key: str, name: str) -> str:
    """Read a short text such as a category; a whole number becomes its digits, null or a missing key ""."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise RecordError(f"{name}: {key} should be text, got {type(value).__name__}")
    return "" if value is None else unicode_of(str(value), key, name)


def present(row: Row) -> Row:
    """Drop a row's nulls: merged tables have the columns of all of them."""
    return {key: value for key, value in row.items() if value is not None}


def prompt_of(row: Row, name: str, key: str = "prompt") -> Prompt:
    prompt = row[key]
    return messages_of(prompt, key, name) if isinstance(prompt, list) else text_of(prompt, key, name)


def with_system(prompt: Prompt, row: Row, name: str) -> Prompt:
    """Put the system message of a row's `system` column before its prompt."""
    system = row.get("system")
    if system is None or (isinstance(system, str) and not system.strip()):
        return prompt
    message = {"role": "system", "content": text_of(system, "system", name)}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[0]["role"] != "system":
        return [message, *messages]
    if messages[0] != message:
        raise RecordError(f"{name}: the row has a system column and another system message; leave one of them out")
    return prompt


def template_fields(row: Row, name: str) -> tuple[Tools | None, dict[str, Any]]:
    """Read (tools, chat_template_kwargs) of a row; both may be JSON in a text, as tables hold them."""
    tools, kwargs = (from_text(row.get(key), key, name) for key in OPTIONAL_COLUMNS)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RecordError(f"{name}: tools should be a list of JSON schemas {{...}}, got {reprlib.repr(tools)}")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RecordError(f"{name}: chat_template_kwargs should be an object {{...}}, got {reprlib.repr(kwargs)}")
    return tools or None, kwargs or {}


def is_learned(message: Message) -> bool:
    """Return whether a message is an answer to be learned, in a completion."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def message_text(message: Message) -> str:
    """Join all that a message says, for people to read."""
    thought = message.get("reasoning_content")
    calls = [call["function"] for call in message.get("tool_calls") or []]
    said = [f"({thought})" if thought else "", message.get("content") or ""]
    said += [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
    return "\n".join(part for part in said if part)


def messages_text(messages: list[Message]) -> str:
    """Join several messages to one text, for people to read."""
    return "\n\n".join(f"{message['role']}: {message_text(message)}" for message in messages)


# Rows of another kind -------------------------------------------------------------------------------------------------

FORMS = {
    "prompt": '{"prompt"}',
    "demonstration": '{"prompt", "completion"} or {"messages": [...]}',
    "comparison": '{"prompt", "chosen", "rejected"}, or chosen and rejected as two whole conversations',
}
_VERBS = {
    "prompt": "this is a prompt without an answer, which `rlhf-fast ppo` and `generate` take",
    "demonstration": "this is a demonstration, which `rlhf-fast sft` takes",
    "comparison": "this is a comparison, which `rlhf-fast dpo` and `reward` take",
}
_OTHERS = {  # columns of other people's, and what they should be called
    ("instruction", "output"): 'rename "instruction" (with "input" behind it) to "prompt" and "output" to "completion"',
    ("question", "answer"): 'rename "question" to "prompt" and "answer" to "completion"',
    ("text",): 'a "text" does not say what is asked and what is answered: split it into a prompt and a completion',
}


def kind_of(row: Row) -> str:
    """Tell what a row without nulls is, by its keys; empty if that cannot be told."""
    if row.keys() & {"chosen", "rejected"}:
        return "comparison"
    if row.keys() & {"messages", "conversations", "completion"}:
        return "demonstration"
    return "prompt" if "prompt" in row else ""


def get(row: Row, key: str, kind: str, name: str) -> Any:
    """Read a column that a row of that kind must have; the error lists the forms, and guesses what the row is."""
    if key in row:
        return row[key]
    said = f"{name}: {key!r} is missing; the row has {', '.join(map(repr, row)) or 'nothing'}; expected {FORMS[kind]}"
    actual = kind_of(row)
    hint = _VERBS.get(actual, "") if actual != kind else ""
    if not actual:
        hint = next((way for keys, way in _OTHERS.items() if row.keys() >= set(keys)), "")
    raise RecordError(f"{said}; {hint}" if hint else said)
