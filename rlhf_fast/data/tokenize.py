"""Tokenise records: the prompt that a model is given, and the answer that it is to learn.

Every trainer, the generator and the evaluation make their tokens here. An answer is learned behind exactly the tokens
that a model has before it when it is asked, through the token that ends its turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.batches import Example
from rlhf_fast.data.chat import Chat
from rlhf_fast.data.conversations import Tokenized
from rlhf_fast.data.messages import is_learned
from rlhf_fast.data.records import Comparison, Demonstration, PromptRecord, Tools, read_record
from rlhf_fast.data.templates import Message, Prompt, Span

Record = PromptRecord | Demonstration | Comparison


def tokenize_record(
    record: Record | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    turns: Literal["all", "last"] = "all",
    max_length: int | None = None,
    parse_special_tokens: bool | None = None,
) -> list[Tokenized]:
    """Tokenise a record of any of the forms that trainers read (data/records.py).

    A demonstration gives one conversation where the chat template only adds to what it has rendered. An answer before
    which it renders earlier turns anew (without their thoughts, say) begins another one, with all that comes before. A
    comparison gives the chosen and the rejected answer behind the prompt; a prompt itself, of which nothing is learned.

    Where the template has `{% generation %}` marks, what they hold is learned of a demonstration, and an end token
    behind them; else all that the template renders after its generation prompt, through the token that ends the turn.
    Nothing is learned of a message with `weight: 0`.

    Args:
        template_kwargs: what the template reads besides messages and tools; laid over what the tokenizer was saved
            with, and over the row's own.
        turns: of the assistant's turns of a demonstration, all or the last are learned.
        max_length: tokens; None: no limit.
        parse_special_tokens: special tokens that are spelled out in messages become tokens; None: as the tokenizer was
            saved (text, if it says nothing).

    Raises:
        ValueError: a row that cannot be used, or that the template does not render; a longer one than `max_length`.
    """
    if isinstance(record, Mapping):
        record = read_record(dict(record))
    kwargs = {**record.template_kwargs, **(template_kwargs or {})}
    tools, name, special = record.tools, record.name, parse_special_tokens
    if isinstance(record, PromptRecord):
        ids = tokenize_prompt(tokenizer, record.prompt, tools, kwargs, special, max_length, name)
        return [Tokenized(ids, (False,) * len(ids))]
    if isinstance(record, Comparison):
        sides = tokenize_comparison(record, tokenizer, kwargs, special, max_length)
        return [
            Tokenized(s.prompt + s.response, (False,) * len(s.prompt) + (s.own or (True,) * len(s.response)))
            for s in sides
        ]
    return _conversations(record, tokenizer, kwargs, turns, max_length, special)


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    tools: Tools | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    parse_special_tokens: bool | None = None,
    max_length: int | None = None,
    name: str = "",
) -> tuple[int, ...]:
    """The tokens that a model has before it when it is asked for an answer. Text alone is one user's message; a last
    message of the assistant's is one to go on with. Arguments and errors as for `tokenize_record`."""
    messages, begun = _asked(prompt, name)
    chat = Chat(tokenizer, messages, tools, template_kwargs, parse_special_tokens, name)
    ids = _encoded(chat, chat.asked(len(messages) - bool(begun), begun))
    _check_length(len(ids), max_length, name)
    return tuple(ids)


def tokenize_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    answer: str | list[Message],
    tools: Tools | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    parse_special_tokens: bool | None = None,
    max_length: int | None = None,
    name: str = "",
    strict: bool = True,
) -> Example:
    """Tokenise a prompt and one answer to it, through the token that ends the turn. Arguments and errors as for
    `tokenize_record`; without `strict` no words of an answer are an error, as a model may write any."""
    said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    messages, begun = _continued(prompt, said, name)
    chat = Chat(tokenizer, messages, tools, template_kwargs, parse_special_tokens, name, strict)
    asked, ids, _ = _turn(chat, len(messages) - 1, begun)
    _check_length(len(asked) + len(ids), max_length, name)
    return Example(tuple(asked), tuple(ids))


def tokenize_comparison(
    comparison: Comparison,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None = None,
    parse_special_tokens: bool | None = None,
    max_length: int | None = None,
    scored: bool = False,
) -> list[Example]:
    """The chosen and the rejected answer, each behind the prompt. Of an answer of several turns the assistant's are its
    own, each with its end, and what others say is read only.

    Args:
        scored: the answers are read for a score, and nothing of them is learned; so a template may render earlier
            turns anew once others follow.

    Arguments and errors else as for `tokenize_record`.
    """
    kwargs = {**comparison.template_kwargs, **(template_kwargs or {})}
    tools, name, special = comparison.tools, comparison.name, parse_special_tokens
    sides = []
    for answer in comparison.answers:
        if isinstance(answer, str) or len(answer) == 1:
            side = tokenize_example(tokenizer, comparison.prompt, answer, tools, kwargs, special, max_length, name)
        else:
            side = _tokenize_turns(comparison, answer, tokenizer, kwargs, special, max_length, scored)
        sides.append(side)
    return sides


def _tokenize_turns(
    comparison: Comparison,
    answer: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    kwargs: Mapping[str, Any],
    parse_special_tokens: bool | None,
    max_length: int | None,
    scored: bool,
) -> Example:
    tools, name = comparison.tools, comparison.name
    asked = tokenize_prompt(tokenizer, comparison.prompt, tools, kwargs, parse_special_tokens, None, name)
    whole = Demonstration(comparison.prompt, answer, name, tools)
    *earlier, last = _conversations(whole, tokenizer, kwargs, "all", max_length, parse_special_tokens, marks=False)
    if (earlier and not scored) or last.input_ids[: len(asked)] != asked:
        raise ValueError(
            f"{name}: an answer of several turns, whose earlier ones the chat template renders otherwise once others "
            "follow; leave the row out, compare one answer, or choose another chat_template"
        )
    return Example(asked, last.input_ids[len(asked) :], last.loss_mask[len(asked) :])


def _conversations(
    record: Demonstration,
    tokenizer: PreTrainedTokenizerBase,
    kwargs: Mapping[str, Any],
    turns: str,
    max_length: int | None,
    parse_special_tokens: bool | None,
    marks: bool = True,
) -> list[Tokenized]:
    completion = record.completion
    said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    messages, begun = _continued(record.prompt, said, record.name)
    chat = Chat(tokenizer, messages, record.tools, kwargs, parse_special_tokens, record.name)
    first = len(messages) - len(said)
    learned = [i for i in range(first, len(messages)) if is_learned(messages[i])]
    conversations: list[Tokenized] = []
    ids: tuple[int, ...] = ()
    loss_mask: tuple[bool, ...] = ()
    for number in learned[-1:] if turns == "last" else learned:
        asked, answer, mask = _turn(chat, number, begun if number == first else "", marks)
        if tuple(asked[: len(ids)]) != ids:
            conversations.append(Tokenized(ids, loss_mask))
            ids, loss_mask = (), ()
        loss_mask += tuple(mask[len(ids) :])
        ids = (*asked, *answer)
        _check_length(len(ids), max_length, record.name)
    conversations.append(Tokenized(ids, loss_mask))
    if not any(conversation.learned for conversation in conversations):
        raise ValueError(
            f"{record.name}: the chat template's generation marks hold no token of the answers; expected those between "
            "{% generation %} and {% endgeneration %}"
        )
    return [conversation for conversation in conversations if conversation.learned]


def _asked(prompt: Prompt, name: str) -> tuple[list[Message], str]:
    """(messages, beginning of the answer) of a prompt."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}], ""
    last = prompt[-1]
    if last["role"] != "assistant":
        return prompt, ""
    if not last.get("content") or last.keys() & {"tool_calls", "reasoning_content"}:
        raise ValueError(
            f"{name or 'the prompt'}: its last message is an assistant's with tool calls or a thought, which cannot be "
            "gone on with; only text can"
        )
    return prompt, last["content"]


def _continued(prompt: Prompt, said: list[Message], name: str) -> tuple[list[Message], str]:
    """(messages, beginning of the first answer) of a prompt and what was said to it."""
    messages, begun = _asked(prompt, name)
    if not begun:
        return [*messages, *said], ""
    first = {**said[0], "content": begun + (said[0].get("content") or "")}
    return [*messages[:-1], first, *said[1:]], begun


def _turn(chat: Chat, number: int, begun: str, marks: bool = False) -> tuple[list[int], list[int], list[bool]]:
    """(asked, answer, which of both are learned) of the assistant's message of that number.

    The text is tokenised whole, and cut where the answer begins; an answer tokenised alone may come out otherwise.
    """
    asked, text, spans = chat.answered(number, begun)
    cut = chat.last_special(asked)  # where any tokenizer cuts, so that what stands before is read once
    head = _encoded(chat, asked[:cut])
    before, whole = ([*head, *_encoded(chat, x, start=not cut)] for x in (asked[cut:], asked[cut:] + text))
    if marks and spans is not None:
        mask = _in_spans(chat, asked + text, spans, len(whole))
        cut = next((i for i in range(min(len(before), len(whole))) if before[i] != whole[i]), len(before))
        last = max((i for i, inside in enumerate(mask) if inside), default=len(mask) - 1)
        if any(mask) and last + 1 < len(whole) and whole[last] not in chat.ends and whole[last + 1] in chat.ends:
            last += 1  # else it would never learn to stop
            mask[last] = True
        return whole[:cut], whole[cut : last + 1], mask[: last + 1]
    answer = whole[len(before) :] if whole[: len(before)] == before else _behind(chat, before, whole, text)
    answer = _through_end(chat, answer, number)
    return before, answer, [False] * len(before) + [True] * len(answer)


def _through_end(chat: Chat, answer: list[int], number: int) -> list[int]:
    """An answer through the token that ends its turn, without what the template writes behind it; with the one that it
    leaves to what follows, or the tokenizer's, if it writes none."""
    special, tail = chat.added.special_ids, len(answer)
    while tail and (answer[tail - 1] in special or not str(chat.tokenizer.decode([answer[tail - 1]])).strip()):
        tail -= 1
    ends = [i for i in range(tail, len(answer)) if answer[i] in chat.ends]
    ends = ends[:1] or [i for i in range(tail, len(answer)) if answer[i] in special][-1:]
    return answer[: ends[0] + 1] if ends else [*answer, chat.end_after(number)]


def _behind(chat: Chat, before: list[int], whole: list[int], text: str) -> list[int]:
    """The tokens of an answer whose first one would reach back into what is asked, as a model can write them there."""
    decode = chat.tokenizer.decode
    for anchor in (chat.tokenizer.eos_token, "\n", ""):  # behind which no space is put before a text
        start, ids = _encoded(chat, anchor), _encoded(chat, anchor + text)
        answer = ids[len(start) :]
        if ids[: len(start)] == start and decode([*before, *answer]) == decode(whole):
            return answer
    if not chat.strict:
        return _encoded(chat, text)
    raise ValueError(
        f"{chat.name}: this tokenizer gives other tokens to the prompt where an answer follows, and none to the answer "
        "behind the prompt; choose another chat_template, one that ends its generation prompt with a special token"
    )


# Text to tokens and back ----------------------------------------------------------------------------------------------


def _encoded(chat: Chat, text: str, start: bool = True) -> list[int]:
    """The tokens of a text of `chat`; without a template, behind the start that the tokenizer puts before any text."""
    if not text:
        return []
    ids = _start(chat.tokenizer) if start and chat.template is None else []
    for place, piece, typed in chat.pieces(text):
        ids += (
            _as_text(chat, piece, place)[0] if typed else chat.tokenizer(piece, add_special_tokens=False)["input_ids"]
        )
    return ids


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text. What it puts behind, such as an end, belongs to no message."""
    alone, framed = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    at = next((i for i in range(len(framed)) if framed[i : i + len(alone)] == alone), 0)
    return framed[:at]


def _as_text(chat: Chat, piece: str, place: int) -> tuple[list[int], list[Span]]:
    """(tokens, their places in `piece`) of a piece of a text in which somebody typed special tokens: they stay text."""
    literal, places = chat.literal(piece)
    anchor = "\n" if place else ""  # behind which no space is put before a text that is no beginning

    def encode(text: str) -> tuple[list[int], list[Span]]:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        encoding = chat.tokenizer(text, return_offsets_mapping=chat.tokenizer.is_fast, **options)
        return encoding["input_ids"], encoding.get("offset_mapping") or [(0, 0)] * len(encoding["input_ids"])

    start, (ids, spans) = encode(anchor)[0], encode(anchor + literal)
    if ids[: len(start)] != start:
        start, anchor, (ids, spans) = [], "", encode(literal)
    spans = [(max(a - len(anchor), 0), b - len(anchor)) for a, b in spans[len(start) :]]
    return ids[len(start) :], [(places[a], places[b - 1] + 1) if b > a else (0, 0) for a, b in spans]


def _in_spans(chat: Chat, text: str, spans: Sequence[Span], count: int) -> list[bool]:
    """Say of each of the `count` tokens of a text whether it has a character in these places of the text."""
    if not chat.tokenizer.is_fast:
        raise ValueError(
            f"{chat.name}: the chat template marks what is generated, and this tokenizer "
            f"({type(chat.tokenizer).__name__}) does not say where its tokens stand; take the marks out"
        )
    token_spans: list[Span] = []
    for place, piece, typed in chat.pieces(text):
        if typed:
            offsets = _as_text(chat, piece, place)[1]
        else:
            offsets = chat.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        token_spans += [(place + a, place + b) for a, b in offsets]
    assert len(token_spans) == count
    return [any(a < end and b > begin for begin, end in spans) for a, b in token_spans]


def _check_length(tokens: int, max_length: int | None, name: str) -> None:
    if max_length is not None and tokens > max_length:
        raise ValueError(
            f"{name}: prompt and response have {tokens} tokens, more than max_length = {max_length}; "
            "shorten the text or raise max_length"
        )


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode response tokens to text, without special tokens, keeping all spaces."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
