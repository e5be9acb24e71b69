"""Prompts and settings, checked, as sequences that can be run."""

from __future__ import annotations

import sys
from collections import abc
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.records import PromptRecord, read_record
from rlhf_fast.data.templates import Message, added_tokens
from rlhf_fast.data.tokenize import tokenize_record
from rlhf_fast.models.adapters import Model
from rlhf_fast.models.ends import end_tokens
from rlhf_fast.models.forward import unwrapped
from rlhf_fast.rollout.sampling import SamplingParams, Uniforms
from rlhf_fast.rollout.sequence import Sequence

TokenIds = abc.Sequence[int] | torch.Tensor | np.ndarray
Params = SamplingParams | abc.Mapping[str, Any] | abc.Sequence[SamplingParams | abc.Mapping[str, Any]] | None
Prompts = abc.Sequence[str | list[Message] | PromptRecord | TokenIds]


def sequences_for(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Prompts,
    params: Params,
    longest: int = sys.maxsize,
) -> list[Sequence]:
    """n sequences for each prompt, in order; none may get longer than `longest`.

    Raises:
        TypeError, ValueError: what `Generator.generate` says.
    """
    if isinstance(prompts, str | dict | torch.Tensor | np.ndarray):
        kind = "string" if isinstance(prompts, str) else type(prompts).__name__
        raise TypeError(f"prompts: got one {kind}; expected a list of prompts")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts: the list is empty")
    several = isinstance(params, abc.Sequence)
    all_params = [_params(given) for given in params] if several else [_params(params)] * len(prompts)  # type: ignore[union-attr]
    if len(all_params) != len(prompts):
        raise ValueError(f"params: {len(all_params)} for {len(prompts)} prompts; expected one, or one for each")
    limit = min(context_length(unwrapped(model).config.get_text_config()) or sys.maxsize, longest)
    vocabulary = unwrapped(model).get_input_embeddings().weight.shape[0]
    ends = frozenset() if tokenizer is None else end_tokens(model, tokenizer)
    sequences = []
    for index, (prompt, wanted) in enumerate(zip(prompts, all_params, strict=True)):
        _check_params(wanted, tokenizer, vocabulary)
        ids = _encode(tokenizer, prompt, index)
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(f"prompts: prompt {index} has token ids outside the vocabulary of {vocabulary}")
        if len(ids) + wanted.max_new_tokens > limit:
            who = prompt.name if isinstance(prompt, PromptRecord) and prompt.name else f"prompt {index}"
            raise ValueError(
                f"prompts: {who} has {len(ids)} tokens, which with max_new_tokens = "
                f"{wanted.max_new_tokens} exceeds the model's context of {limit}"
                f"{' here (see docs/models.md)' if limit == longest else ''}; shorten one of them"
            )
        texts, tokens = _stops(tokenizer, wanted)
        stops = frozenset({*wanted.stop_token_ids, *tokens, *(() if wanted.ignore_eos else ends)})
        words = _bad_words(tokenizer, wanted, vocabulary)
        for sample in range(wanted.n):
            numbers = Uniforms(wanted.seed, index, sample)
            sequences.append(Sequence(index, sample, ids, wanted, stops, numbers, words, stop_texts=texts))
    return sequences


def context_length(config: Any) -> int | None:
    """Count the positions that a model is made for, None where its config does not say: those of its table, or, with
    YaRN (arXiv 2309.00071), of the stretched one, which many configs leave to the factor."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(inner for inner in ropes.values() if isinstance(inner, dict))):  # one, or one a kind of layer
        if limit and rope.get("rope_type") == "yarn":
            limit = max(limit, int(rope.get("original_max_position_embeddings", limit) * (rope.get("factor") or 1.0)))
    return limit


def _params(given: Any) -> SamplingParams:
    """Settings, also from a dict of them."""
    if isinstance(given, abc.Mapping):
        return SamplingParams(**given)
    if given is None or isinstance(given, SamplingParams):
        return given or SamplingParams()
    raise TypeError(f"params: got {type(given).__name__}; expected SamplingParams, or a dict such as {{'n': 2}}")


def _check_params(params: SamplingParams, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> None:
    if tokenizer is None:
        if not params.stop_token_ids and not params.ignore_eos:
            raise ValueError("stop_token_ids: without a tokenizer, say which tokens end a response, or set ignore_eos")
        if params.stop:
            raise ValueError("stop: stop texts need a tokenizer; give one, or use stop_token_ids")
    for name, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", tuple(params.logit_bias))):
        _check_tokens(name, tokens, vocabulary)


def _check_tokens(name: str, tokens: abc.Iterable[Any], vocabulary: int) -> None:
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise TypeError(f"{name}: {token!r:.40} is no token id; expected a whole number")
        if not 0 <= token < vocabulary:
            raise ValueError(f"{name}: token {token} is outside the vocabulary of {vocabulary}")


def _stops(tokenizer: PreTrainedTokenizerBase | None, params: SamplingParams) -> tuple[tuple[str, ...], list[int]]:
    """(texts, tokens) of `params.stop`: the text of a special token is that token, for no response's text has it."""
    texts: list[str] = []
    tokens: list[int] = []
    special = () if tokenizer is None else added_tokens(tokenizer).special
    for stop in params.stop:
        inside = next((token for token in special if token in stop), None)
        if inside is None:
            texts.append(stop)
        elif inside == stop or stop in special:
            tokens.append(int(tokenizer.convert_tokens_to_ids(stop)))  # type: ignore[union-attr, arg-type]
        else:
            raise ValueError(
                f"stop: {stop!r} holds the special token {inside!r} beside other text, which no response's text has; "
                "give the token alone"
            )
    return tuple(texts), tokens


def _bad_words(
    tokenizer: PreTrainedTokenizerBase | None, params: SamplingParams, vocabulary: int
) -> tuple[tuple[int, ...], ...]:
    """Encode each text both as it stands within a text and after a space, as token ids."""
    words: list[tuple[int, ...]] = []
    for word in params.bad_words:
        if not isinstance(word, str):
            _check_tokens("bad_words", word, vocabulary)
            words.append(tuple(int(token) for token in word))
        elif tokenizer is None:
            raise ValueError(f"bad_words: {word!r} is text, which needs a tokenizer; give one, or token ids")
        else:
            words += [_within(tokenizer, form) for form in (word, " " + word)]
            words.append(tuple(tokenizer(word, add_special_tokens=False)["input_ids"]))
    return tuple(dict.fromkeys(words))


def _within(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """The tokens of a text that other text stands before: some tokenizers put a space before the first word."""
    before, ids = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in ("\n", "\n" + text))
    if ids[: len(before)] == before:
        return tuple(ids[len(before) :])
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode(tokenizer: PreTrainedTokenizerBase | None, prompt: Any, index: int) -> tuple[int, ...]:
    if isinstance(prompt, dict):
        raise TypeError(f"prompts: prompt {index} is one message; expected a list of messages")
    record = prompt if isinstance(prompt, PromptRecord) else None
    if record is None and not isinstance(prompt, str) and not _is_messages(prompt):
        ids = _token_ids(prompt, index)
    elif tokenizer is None:
        raise ValueError(f"prompts: prompt {index} is text, which needs a tokenizer; give one, or token ids")
    elif record is None and (not prompt or (isinstance(prompt, str) and not prompt.strip())):
        ids = ()
    else:
        ids = tokenize_record(record or read_record({"prompt": prompt}, f"prompts: prompt {index}"), tokenizer)[
            0
        ].input_ids
    if not ids:
        raise ValueError(f"prompts: prompt {index} is empty")
    return ids


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, list | tuple) and any(isinstance(message, dict) for message in prompt)


def _token_ids(prompt: Any, index: int) -> tuple[int, ...]:
    """Token ids as a list, a tensor or an array of one dimension."""
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.detach().cpu().numpy()
    try:
        ids = np.asarray(prompt)
    except ValueError as error:  # rows of several lengths
        raise TypeError(f"prompts: prompt {index} is no list of token ids: {error}") from error
    if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
        raise TypeError(
            f"prompts: prompt {index} is {type(prompt).__name__} of {ids.dtype} with shape {ids.shape}; expected text, "
            "messages, or token ids: whole numbers in one dimension, without padding"
        )
    return tuple(ids.tolist())
