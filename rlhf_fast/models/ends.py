"""Find which tokens end a turn, and which pads instead."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.templates import turn_end
from rlhf_fast.models.forward import unwrapped


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Unite the end tokens that the generation config and the config of a model name, one or several, that of the
    tokenizer, and the one that the chat template ends an answer with."""
    inner = unwrapped(model)
    configs = (getattr(inner, "generation_config", None), inner.config, inner.config.get_text_config())
    named: list[Any] = [getattr(config, "eos_token_id", None) for config in configs]
    named += [tokenizer.eos_token_id, turn_end(tokenizer)]
    ids = {i for end in named for i in (end if isinstance(end, Sequence) else [end]) if i is not None}
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    return frozenset(int(i) for i in ids if 0 <= i < vocabulary)  # others are never sampled


def pad_apart(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a classifier and its tokenizer a padding token that ends no turn.

    Here no padding is ever read. Transformers' classifiers score the last token that is not padding: where that is the
    end token, too, the one before it. Without any other token to pad with, the model gets none, and they refuse batches
    of several rows rather than misread them.
    """
    inner, ends = unwrapped(model), end_tokens(model, tokenizer)
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    spare = sorted(special, key=lambda text: (not re.search("pad|reserved|unused", text.lower()), special[text]))
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, *(special[text] for text in spare))
    chosen = next((i for i in candidates if i is not None and i < vocabulary and i not in ends), None)
    if chosen not in (None, tokenizer.pad_token_id):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    inner.config.pad_token_id = chosen
