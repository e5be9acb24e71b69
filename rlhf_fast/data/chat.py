"""Text to tokens: prompts through the tokenizer's chat template, responses with the end token behind them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.batches import Example

Message = dict[str, Any]
Prompt = str | list[Message]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt up to where the answer begins. Text alone is one user message.

    A tokenizer without a chat template (a base model's) gets the text, messages joined by blank lines.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if tokenizer.chat_template is None:
        return tuple(tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"])
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a finished response, the end token included (a model that is never shown it never stops)."""
    return (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str, max_length: int, name: str) -> Example:
    """Prompt and response as one example.

    Raises:
        ValueError: it is longer than `max_length` tokens; `name` (a file and line, say) tells which.
    """
    example = Example(encode_prompt(tokenizer, prompt), encode_response(tokenizer, response))
    if len(example) > max_length:
        raise ValueError(
            f"{name}: prompt and response have {len(example)} tokens, more than max_length = {max_length}; "
            "shorten the text or raise max_length"
        )
    return example


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...] | list[int]) -> str:
    """The text of response tokens, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text, for people to read."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
