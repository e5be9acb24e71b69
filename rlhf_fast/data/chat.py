"""A conversation on its way to tokens: what is asked, what is answered, and that nothing of either is lost."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.templates import (
    Message,
    Span,
    added_tokens,
    alike,
    dropped,
    kept,
    lost_call,
    pattern_of,
    template_of,
    turn_end,
)

_OPENED = re.compile(r"<(\w+)>\s*$")


class Chat:
    """A conversation, and a tokenizer that it is for.

    In its texts each special token that somebody typed is marked, so that it stays text when the text is tokenised.

    Args:
        messages: with text as their content, or with None beside tool calls or a thought.
        name: where they come from, for messages of errors.
        strict: refuse words that the template has no place for; without it, as for what a model wrote, they are put
            where the answer's words stand.

    Raises:
        ValueError: several roles or turns for a tokenizer without a chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        parse_special_tokens: bool | None = None,
        name: str = "",
        strict: bool = True,
    ) -> None:
        self.tokenizer, self.name, self.strict = tokenizer, name or "the conversation", strict
        try:
            self.template = template_of(tokenizer, tools, kwargs)
        except (TypeError, ValueError) as error:  # of the row's own settings, too
            raise ValueError(f"{self.name}: {error}") from error
        if parse_special_tokens is None:
            parse_special_tokens = kept(tokenizer).get("parse_special_tokens", False)
        said = json.dumps([messages, tools], ensure_ascii=False, default=str)
        self.edge = next(c for c in map(chr, range(0xE001, 0xF900)) if c not in said)  # private use: in no template
        self.mark = f"{self.edge}x{self.edge}"
        self.added = added_tokens(tokenizer)
        self.typed = () if parse_special_tokens else tuple(dict.fromkeys(pattern_of(self.added.special).findall(said)))
        self.messages, self.tools = self._marked(messages), self._marked(tools)
        if self.template is None:
            self._check_roles()

    # What is asked, and what is answered ------------------------------------------------------------------------------

    def asked(self, count: int, begun: str = "") -> str:
        """The text that a model has before it when it is asked for message number `count`, or, of an answer that
        `begun` is the beginning of, to go on with that message."""
        before, begun = self.messages[:count], self._marked(begun)
        if self.template is None:
            return "".join(message["content"] for message in before) + begun
        if not begun:
            text, _ = self._render(before, ask=True)
            self._check_rendered(before, text, ask=True)
            return text
        text, _ = self._render([*before, {**self.messages[count], "content": begun + self.mark}])
        text, mark, _ = text.partition(self.mark)
        if not mark or not _holds(text, begun):
            raise ValueError(
                f"{self.name}: the last message is an assistant's to be continued, which the chat template does not "
                "render as it stands; leave it out, or end with a user's message"
            )
        self._check_rendered(before, text, ask=False)
        return text

    def answered(self, number: int, begun: str = "") -> tuple[str, str, list[Span] | None]:
        """Render the assistant's message of that number as (asked, answer, marks).

        `answer` is what the template renders after `asked`, in the very context that the model is asked in; where it
        renders that context or the answer otherwise once the answer is there, the answer as it would stand there.
        `marks` are the places in `asked + answer` that the template's own generation marks hold, None without any.
        """
        asked, message = self.asked(number, begun), self.messages[number]
        begun = self._marked(begun)
        content = (message.get("content") or "")[len(begun) :]
        if self.template is None:
            return asked, content, None
        goes_on = bool(begun)
        if thought := self._opened(asked):  # whose beginning stands in what is asked already
            whole, content = content, re.sub(rf"^\s*<{thought}>\n?", "", content)
            goes_on = goes_on or content != whole
        text, spans = self._render(self.messages[: number + 1])
        answer, marks = text[len(asked) :], None
        if text.startswith(asked) and _holds(answer, content, at_once=goes_on):
            if self.template.has_marks:
                first = len(asked) if begun else 0
                marks = [(max(begin, first), end) for begin, end in spans if end > len(asked)]
        else:
            answer = self._as_it_would_stand(number, asked, text, begun, content, goes_on)
        return asked, self._whole(number, asked, answer), marks

    def _as_it_would_stand(self, number: int, asked: str, text: str, begun: str, content: str, goes_on: bool) -> str:
        """The answer behind an `asked` that the template does not leave as it is, or with words that it would drop."""
        message, before = self.messages[number], self.messages[:number]
        more = asked[alike(asked, text) :]  # that the template does not render where the answer is there
        thinks = message.get("reasoning_content") or re.search(r"</\w+>", content)
        if self.strict and not goes_on and thinks and more.strip() and not self._opened(more):
            raise ValueError(
                f"{self.name}: message {number} has a thought, for which the generation prompt leaves no place, as it "
                f"ends in {more!r}; set template_kwargs that let the model think (enable_thinking: true), or leave the "
                "thought out"
            )
        if content or goes_on:
            text, _ = self._render([*before, {**message, "content": begun + self.mark}])
            if self.mark not in text:
                raise ValueError(f"{self.name}: the chat template does not render the assistant's message {number}")
        if goes_on:  # with what stands in what is asked
            return text[text.index(self.mark) :].replace(self.mark, content)
        context, _ = self._render(before)
        common = alike(asked, text)
        if asked.startswith(context) and common < len(context):
            # Earlier turns come out otherwise once the answer is there: of it, what stands around a text alone.
            if not content:
                raise ValueError(
                    f"{self.name}: the chat template renders what stands before message {number} otherwise once that "
                    "message follows, which can be learned only of one with text"
                )
            short = [{"role": "user", "content": "."}, {"role": "assistant", "content": self.mark}]
            question, answer = self._render(short[:1], ask=True)[0], self._render(short)[0]
            lead = answer[alike(question, answer) :].partition(self.mark)[0]
            return (lead + text[text.index(self.mark) :]).replace(self.mark, content)
        return text[common:].replace(self.mark, content)

    def _whole(self, number: int, asked: str, answer: str) -> str:
        """The answer with the thought that it lacks, and the end of one that the generation prompt has begun."""
        message, opened = self.messages[number], self._opened(asked)
        thought = message.get("reasoning_content") or ""
        if thought and self._renders_thought(number) and _holds(answer, thought):
            thought = ""
        if opened and f"</{opened}>" not in answer:
            answer, thought = f"{thought}\n</{opened}>\n\n{answer}", ""
        if thought:
            raise ValueError(
                f"{self.name}: the chat template does not render reasoning_content, which would not be learned; put "
                "the thought into the content as the model is to write it, or choose another chat_template"
            )
        self._check_call(message, answer)
        return answer

    def _opened(self, asked: str) -> str:
        """The tag of a thought that the generation prompt begins, such as `think`; the template knows its end."""
        opened = _OPENED.search(asked)
        assert self.template is not None
        return opened[1] if opened and f"</{opened[1]}>" in self.template.text else ""

    # Tokens -----------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a turn, as far as tokenizer and template say."""
        return frozenset(i for i in (self.tokenizer.eos_token_id, turn_end(self.tokenizer)) if i is not None)

    def end_after(self, number: int) -> int:
        """The token that ends message `number` where the template writes none in it: the special token that it begins
        what follows with, else the tokenizer's."""
        if self.template is None:
            return int(self.tokenizer.eos_token_id)
        calls = self.messages[number].get("tool_calls")
        following = {"role": "tool", "content": "."} if calls else {"role": "user", "content": "."}
        said = [{**message, "reasoning_content": None} for message in self.messages[: number + 1]]
        said[-1]["content"] = said[-1].get("content") and "."  # what it says does not matter, and may hold a thought
        try:
            text, more = self._render(said)[0], self._render([*said, following])[0]
        except ValueError:  # the template has no such turn
            text = more = ""
        match = pattern_of(self.added.special).match(more[len(text) :].lstrip())
        if match is None or not more.startswith(text):
            return int(self.tokenizer.eos_token_id)
        return int(self.tokenizer.convert_tokens_to_ids(match[0]))  # type: ignore[arg-type]

    def last_special(self, text: str) -> int:
        """The place of the template's last special token in a text that tokenises apart from what stands before it."""
        return max((match.start() for match in pattern_of(self.added.cutting).finditer(text)), default=0)

    def pieces(self, text: str) -> Iterator[tuple[int, str, bool]]:
        """(place, piece, whether somebody typed special tokens in it) of a text, cut at the template's own special
        tokens, where any tokenizer cuts it."""
        if self.edge not in text:
            yield 0, text, False
            return
        place, begun = 0, ""
        for part in re.split(f"({pattern_of(self.added.special).pattern})", text):
            if self.edge in part:
                if begun:
                    yield place - len(begun), begun, False
                yield place, part, True
                begun = ""
            else:
                begun += part
            place += len(part)
        if begun:
            yield place - len(begun), begun, False

    def literal(self, text: str) -> tuple[str, list[int]]:
        """(what was typed, the place in `text` of each of its characters)."""
        parts: list[str] = []
        places: list[int] = []
        place = 0
        for i, part in enumerate(re.split(f"{self.edge}(\\d+){self.edge}", text)):
            said = self.typed[int(part)] if i % 2 else part
            size = len(part) + 2 if i % 2 else len(part)
            parts.append(said)
            places += [min(place + k, place + size - 1) for k in range(len(said))]
            place += size
        return "".join(parts), places

    def _marked(self, value: Any) -> Any:
        """Replace each special token in a value's strings by edge number edge."""
        if not self.typed:
            return value
        if isinstance(value, str):
            return pattern_of(self.typed).sub(lambda m: f"{self.edge}{self.typed.index(m[0])}{self.edge}", value)
        if isinstance(value, dict):
            return {key: self._marked(inner) for key, inner in value.items()}
        return [self._marked(inner) for inner in value] if isinstance(value, list) else value

    # Checks -----------------------------------------------------------------------------------------------------------

    def _render(self, messages: list[Message], ask: bool = False) -> tuple[str, list[Span]]:
        assert self.template is not None
        try:
            text, spans = self.template.render(messages, self.tools, ask)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        if f"\\u{ord(self.edge):04x}" in text:
            raise ValueError(
                f"{self.name}: a special token stands in what the chat template escapes; take it out, or set "
                "parse_special_tokens"
            )
        return text, spans

    def _check_roles(self) -> None:
        roles = [message["role"] for message in self.messages]
        if roles not in (["user"], ["user", "assistant"]) or self.tools:
            raise ValueError(
                f"{self.name}: the tokenizer has no chat template, which messages of the roles {', '.join(roles)} "
                "need; choose one: chat_template: chatml, plain, or the file of a Jinja template"
            )

    def _check_rendered(self, messages: list[Message], text: str, ask: bool) -> None:
        """Require all that was said in what is asked; earlier thoughts need not be in it."""
        squeezed = _squeezed(text)
        lost = self._dropped(messages, ask)
        for i, message in enumerate(messages):
            content = message.get("content") or ""
            stands = any(_squeezed(form) in squeezed for form in (content, *_as_json(content)))
            if (i, "content") in lost or not (stands or self._follows(messages, i)):
                raise ValueError(
                    f"{self.name}: the chat template does not render message {i}, of role {message['role']!r}; leave "
                    "it out, put its text into another message, or choose another chat_template"
                )
            self._check_call(message, text)
        for tool in self.tools or []:
            function = tool.get("function", tool)
            if isinstance(function, dict) and str(function.get("name", "")) not in text:
                raise ValueError(f"{self.name}: the chat template does not render tools; choose another chat_template")

    def _dropped(self, messages: list[Message], ask: bool) -> frozenset[tuple[int, str]]:
        shape = [{**m, **{key: "." for key in ("content", "reasoning_content") if m.get(key)}} for m in messages]
        assert self.template is not None
        try:
            return dropped(self.template, json.dumps(shape), json.dumps(self.tools), ask)
        except ValueError:  # a template that wants certain words; the texts themselves are looked for
            return frozenset()

    def _renders_thought(self, number: int) -> bool:
        return (number, "reasoning_content") not in self._dropped(self.messages[: number + 1], ask=False)

    def _follows(self, messages: list[Message], number: int) -> bool:
        """Return whether the text follows the content of a message, whatever the template makes of it."""
        other = {**messages[number], "content": (messages[number].get("content") or "") + self.mark}
        text, _ = self._render([*messages[:number], other, *messages[number + 1 :]])
        return self.mark in text

    def _check_call(self, message: Message, text: str) -> None:
        if lost := lost_call([message], text):
            raise ValueError(
                f"{self.name}: the chat template does not render the call of {lost!r}; choose another chat_template"
            )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _holds(text: str, part: str, at_once: bool = False) -> bool:
    """Return whether a part is in a text, or at its beginning, white space aside."""
    text, part = _squeezed(text), _squeezed(part)
    return text.startswith(part) if at_once else part in text


def _as_json(text: str) -> list[str]:
    """Write a text as it stands within JSON."""
    return [json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)]
