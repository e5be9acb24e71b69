"""Chat templates: a conversation as text, as transformers renders it, and the token that ends a turn of it.

What a tokenizer's template is used with (its settings, whether special tokens that somebody typed are tokens) stands in
the tokenizer and is saved with it, so that a checkpoint is asked as it was trained.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Message = dict[str, Any]
Prompt = str | list[Message]
Span = tuple[int, int]

KEY = "rlhf_fast"  # of a tokenizer's settings in its own
DATE = "rlhf_fast_date"  # attribute of a tokenizer: the day that its template reads, which no checkpoint keeps
MARK = "\ue000"  # private use: in no template
RESERVED = ("messages", "tools", "conversations", "chat_template", "add_generation_prompt", "continue_final_message")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '' if loop.first else '\n\n' }}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
_DATES = "{% macro strftime_now(format) -%}{{ rlhf_fast_dates[format] }}{%- endmacro %}{{ '' }}"
_FORMATS = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
# Of a template that cannot take messages.
_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


# What a tokenizer's template is used with -----------------------------------------------------------------------------


def use_template(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    parse_special_tokens: bool = False,
    date: datetime.date | None = None,
) -> None:
    """Render conversations of `tokenizer` so from now on; all but the date is saved with it.

    Args:
        template: "chatml", "plain", or the file of a Jinja template; None: the tokenizer's own.
        kwargs: what the template reads besides messages and tools, laid over what the tokenizer was saved with.
        parse_special_tokens: special tokens that are spelled out in messages become tokens.
        date: the day that a template is told which asks for it; None: that of the call.

    Raises:
        ValueError: no such template, or one that needs tokens which the tokenizer lacks.
    """
    if template is not None:
        tokenizer.chat_template = _text_of(template, tokenizer)
    before = kept(tokenizer)
    now = {
        "template_kwargs": {**before.get("template_kwargs", {}), **(kwargs or {})},
        "parse_special_tokens": parse_special_tokens or before.get("parse_special_tokens", False),
    }
    if any(now.values()):
        tokenizer.init_kwargs[KEY] = now
    if date is not None:
        setattr(tokenizer, DATE, date)


def kept(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what `use_template` has put into a tokenizer, now or before it was saved."""
    kept = tokenizer.init_kwargs.get(KEY)
    return kept if isinstance(kept, dict) else {}


def _text_of(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if template == "chatml":
        missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"chat_template: chatml needs the token {missing[0]}, which this tokenizer does not have; choose "
                "plain, or give the file of a template that it has the tokens for"
            )
        return CHATML
    return PLAIN if template == "plain" else _read(template)


def require_template(template: str | None) -> None:
    """Raise ValueError for a template's file that cannot be read, before there is a tokenizer."""
    if template not in (None, "chatml", "plain"):
        _read(template)


def _read(template: str) -> str:
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"chat_template: {template!r} is neither chatml nor plain nor a file that can be read: "
            f"{getattr(error, 'strerror', None) or error}"
        ) from error


def reads_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer's chat template, or one of several, asks for the day."""
    return "strftime_now" in json.dumps(tokenizer.chat_template)


@dataclass(frozen=True)
class AddedTokens:
    """A tokenizer's tokens whose text is one token wherever it stands."""

    texts: tuple[str, ...]
    special: tuple[str, ...]
    special_ids: frozenset[int]
    cutting: tuple[str, ...]  # special ones that leave what stands before them as it is


_added: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, AddedTokens]] = weakref.WeakKeyDictionary()


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> AddedTokens:
    """Return a tokenizer's added tokens; cached, as some have thousands, until their number changes."""
    size, added = _added.get(tokenizer, (-1, None))
    if added is None or size != len(tokenizer):
        tokens = tokenizer.added_tokens_decoder
        added = AddedTokens(
            tuple(token.content for token in tokens.values()),
            tuple(token.content for token in tokens.values() if token.special),
            frozenset(i for i, token in tokens.items() if token.special),
            tuple(token.content for token in tokens.values() if token.special and not token.lstrip),
        )
        _added[tokenizer] = len(tokenizer), added
    return added


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an answer, or begins what follows it; None if it has none."""
    template = template_of(tokenizer)
    if template is None:
        return None
    token = _turn_end(template, added_tokens(tokenizer).texts, str(tokenizer.eos_token or ""))
    return None if token is None else int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]


# Rendering ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """A chat template and what it reads besides messages and tools."""

    text: str
    settings: str  # JSON

    @property
    def has_marks(self) -> bool:
        """Return whether the template marks itself what is generated."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None

    def render(self, messages: list[Message], tools: Any = None, ask: bool = False) -> tuple[str, list[Span]]:
        """Render messages to (text, spans of generation marks); with `ask`, the generation prompt follows.

        A null content and the arguments of tool calls come in the form that the template takes.

        Raises:
            ValueError: it takes them in none; its own words.
        """
        failure: Exception | None = None
        rendered: tuple[str, list[Span]] | None = None
        for form in _forms(messages):
            try:
                rendered = self._render(form, tools, ask)
            except _FAILURES as error:
                failure = failure or error
                continue
            if not lost_call(messages, rendered[0]):
                return rendered
        if rendered is None:
            raise ValueError(f"the chat template refuses the messages: {failure}") from failure
        return rendered

    def _render(self, messages: list[Message], tools: Any, ask: bool) -> tuple[str, list[Span]]:
        if _takes_parts(self):
            messages = [{**message, "content": _parts(message.get("content"))} for message in messages]
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.text,
            return_assistant_tokens_mask=self.has_marks,
            add_generation_prompt=ask,
            **json.loads(self.settings),
        )
        texts, spans = rendered
        return str(texts[0]), list(spans[0]) if self.has_marks else []


def template_of(
    tokenizer: PreTrainedTokenizerBase, tools: Any = None, kwargs: Mapping[str, Any] | None = None
) -> Template | None:
    """A tokenizer's template, of several the one for tools if there are any; `kwargs` over what it was saved with.

    Raises:
        ValueError: it reads the date in a way that cannot be told another one.
    """
    if tokenizer.chat_template is None:
        return None
    text = str(tokenizer.get_chat_template(None, tools))
    settings = {**tokenizer.special_tokens_map, **kept(tokenizer).get("template_kwargs", {}), **(kwargs or {})}
    if reserved := [name for name in RESERVED if name in settings]:
        raise ValueError(f"template_kwargs: {reserved[0]!r} is given by the conversation itself; leave it out")
    date: datetime.date | None = getattr(tokenizer, DATE, None)
    if date is not None and "strftime_now" in text:
        formats = [match[2] for match in _FORMATS.finditer(text)]
        if len(formats) != text.count("strftime_now("):
            raise ValueError("chat_template: it reads the date in a format that is not written out; write it out")
        text = _DATES + text
        settings["rlhf_fast_dates"] = {form: date.strftime(form) for form in formats}
    return Template(text, json.dumps(settings, sort_keys=True))


@functools.lru_cache(maxsize=64)
def _turn_end(template: Template, added: tuple[str, ...], eos: str) -> str | None:
    said = [{"role": "user", "content": "."}, {"role": "assistant", "content": MARK}]
    try:
        last, earlier = (template.render(said[:2] + more)[0].partition(MARK)[2] for more in ([], said[:1]))
    except ValueError:  # not this conversation
        return None
    # Between turns and at the end alike; else at the end; else what begins the next turn.
    pattern = pattern_of(added)
    ends = pattern.findall(last[: alike(last, earlier)])
    if ends:
        return eos if eos in ends else str(ends[-1])
    match = pattern.search(last) or pattern.match(earlier.lstrip())
    return match[0] if match else None


@functools.lru_cache(maxsize=64)
def _takes_parts(template: Template) -> bool:
    """Return whether the template renders a content only as a list of parts, as those of models that see do."""

    def renders(content: Any) -> bool:
        said = [{"role": "user", "content": content}]
        try:
            rendered: Any = render_jinja_template(
                conversations=[said], chat_template=template.text, **json.loads(template.settings)
            )
        except _FAILURES:
            return False
        return MARK in rendered[0][0]

    return not renders(MARK) and renders(_parts(MARK))


@functools.lru_cache(maxsize=1024)
def dropped(template: Template, shape: str, tools: str, ask: bool) -> frozenset[tuple[int, str]]:
    """(message, "content" or "reasoning_content") of what the template does not render of such messages, whatever they
    say.

    Args:
        shape: messages as JSON, in which texts do not matter.
        tools: JSON.
    """
    messages = json.loads(shape)
    parts = [
        (i, key) for i, message in enumerate(messages) for key in ("content", "reasoning_content") if message.get(key)
    ]
    for number, (i, key) in enumerate(parts):
        messages[i][key] = f"{MARK}{number}{MARK}"
    text, _ = template.render(messages, json.loads(tools), ask)
    return frozenset(part for number, part in enumerate(parts) if f"{MARK}{number}{MARK}" not in text)


def _parts(content: str | None) -> Any:
    return content if content is None else [{"type": "text", "text": content}]


def _forms(messages: list[Message]) -> list[list[Message]]:
    """The forms in which templates expect a null content (empty or null) and arguments of calls (object or text)."""
    nulls = any(message.get("content") is None for message in messages)
    calls = any(message.get("tool_calls") for message in messages)
    return [
        [_formed(message, null, as_text) for message in messages]
        for as_text in ((False, True) if calls else (False,))
        for null in (("", None) if nulls else ("",))
    ]


def _formed(message: Message, null: str | None, as_text: bool) -> Message:
    message = {"content": null, **{key: value for key, value in message.items() if value is not None}}
    if "reasoning_content" in message:
        message.setdefault("thinking", message["reasoning_content"])  # what gpt-oss calls it
    if as_text and message.get("tool_calls"):
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return message


def lost_call(messages: list[Message], text: str) -> str:
    """The name of a called function that is not in the text."""
    names = [call["function"]["name"] for message in messages for call in message.get("tool_calls") or []]
    return next((name for name in names if name not in text), "")


def alike(first: str, second: str) -> int:
    """Count the characters that two texts begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


@functools.lru_cache(maxsize=256)
def pattern_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Matches any of these, the longest first."""
    longest = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or r"(?!)")
