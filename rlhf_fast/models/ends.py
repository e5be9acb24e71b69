"""Which tokens end a turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.templates import turn_end
from rlhf_fast.models.forward import unwrapped


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Those that the generation config and the config of a model name, one or several, that of the tokenizer, and the
    one that the chat template ends an answer with."""
    inner = unwrapped(model)
    configs = (getattr(inner, "generation_config", None), inner.config, inner.config.get_text_config())
    named: list[Any] = [getattr(config, "eos_token_id", None) for config in configs]
    named += [tokenizer.eos_token_id, turn_end(tokenizer)]
    ids = {i for one in named for i in (one if isinstance(one, Sequence) else [one]) if i is not None}
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    return frozenset(int(i) for i in ids if 0 <= i < vocabulary)  # others are never sampled
