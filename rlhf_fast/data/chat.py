"""Text to tokens: prompts through the tokenizer's chat template, responses with the end token behind them."""

from __future__ import annotations

import re
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.batches import Example
from rlhf_fast.data.conversations import Conversation

Message = dict[str, Any]
Prompt = str | list[Message]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt up to where the answer begins. Text alone is one user message.

    A tokenizer without a chat template (a base model's) gets the text, messages joined by blank lines. Only the
    template's own special tokens become special: one that somebody typed, such as `<eos>`, stays text.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if tokenizer.chat_template is None:
        text = "\n\n".join(message["content"] for message in messages)
        return tuple(tokenizer(text, split_special_tokens=True)["input_ids"])
    # The template is rendered with a mark in place of each typed special token, which is put back as plain text.
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    said = "".join(message["role"] + message["content"] for message in messages)
    edge = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in said)  # private use: in no template
    for number, token in enumerate(special):
        if token in said:
            mark = f"{edge}{number}{edge}"
            messages = [{**m, **{key: m[key].replace(token, mark) for key in ("role", "content")}} for m in messages]
    text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    ids: list[int] = []
    for i, piece in enumerate(re.split(f"{edge}(\\d+){edge}", text)):
        if i % 2:  # the number of a mark
            ids += tokenizer(special[int(piece)], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        else:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return tuple(ids)


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a finished response, the end token included (a model that is never shown it never stops).

    A special token that is spelled out in the text stays text.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return (*ids, tokenizer.eos_token_id)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str, max_length: int, name: str) -> Example:
    """Prompt and response as one example.

    Raises:
        ValueError: it is longer than `max_length` tokens; `name` (a file and line, say) tells which.
    """
    example = Example(encode_prompt(tokenizer, prompt), encode_response(tokenizer, response))
    _check_length(len(example), max_length, name)
    return example


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completion: str | list[Message],
    max_length: int,
    name: str,
    turns: Literal["all", "last"] = "all",
) -> tuple[Conversation, ...]:
    """What is learned from the assistant's turns of `completion`, all of them or the last: each answer with the end
    token behind it, after exactly the tokens that a model has before it when it is asked for that answer.

    That is one conversation where the chat template only adds to what it has rendered. An answer before which it
    renders earlier turns anew (without their thoughts, say, or trimmed) begins another one, with all that comes before.

    Raises:
        ValueError: a conversation is longer than `max_length` tokens; `name` tells which.
    """
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    found: list[Conversation] = []
    ids: tuple[int, ...] = ()
    loss_mask: tuple[bool, ...] = ()
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and (turns == "all" or number == len(messages)):
            asked, answer = encode_prompt(tokenizer, said), encode_response(tokenizer, message["content"])
            if asked[: len(ids)] != ids:
                found.append(Conversation(ids, loss_mask))
                ids, loss_mask = (), ()
            loss_mask += (False,) * (len(asked) - len(ids)) + (True,) * len(answer)
            ids = asked + answer
            _check_length(len(ids), max_length, name)
        said.append(message)
    return (*found, Conversation(ids, loss_mask))


def _check_length(tokens: int, max_length: int, name: str) -> None:
    if tokens > max_length:
        raise ValueError(
            f"{name}: prompt and response have {tokens} tokens, more than max_length = {max_length}; "
            "shorten the text or raise max_length"
        )


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...] | list[int]) -> str:
    """The text of response tokens, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def user_text(prompt: Prompt) -> str:
    """What the user wrote: of a message list, the user's turns alone."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(message["content"] for message in prompt if message["role"] == "user")


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text, for people to read."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
