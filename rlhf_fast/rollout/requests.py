"""Prompts and settings, checked, as sequences that can be run."""

from __future__ import annotations

from collections import abc

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.chat import Message, encode_prompt
from rlhf_fast.models.adapters import Model
from rlhf_fast.models.forward import unwrapped
from rlhf_fast.rollout.sampling import SamplingParams, Uniforms
from rlhf_fast.rollout.sequence import Sequence

Prompts = abc.Sequence[str | list[Message] | abc.Sequence[int]]


def sequences_for(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Prompts,
    params: SamplingParams | abc.Sequence[SamplingParams] | None,
) -> list[Sequence]:
    """n sequences for each prompt, in order.

    Raises:
        TypeError, ValueError: what `Generator.generate` says.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts: got one string; expected a list of prompts")
    if not prompts:
        raise ValueError("prompts: the list is empty")
    each = [params or SamplingParams()] * len(prompts) if not isinstance(params, abc.Sequence) else list(params)
    if len(each) != len(prompts):
        raise ValueError(f"params: {len(each)} for {len(prompts)} prompts; expected one, or one for each")
    config = unwrapped(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    vocabulary = unwrapped(model).get_input_embeddings().weight.shape[0]
    sequences = []
    for index, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
        _check_params(one, tokenizer, vocabulary)
        ids = _encode(tokenizer, prompt, index)
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(f"prompts: prompt {index} has token ids outside the vocabulary of {vocabulary}")
        if limit and len(ids) + one.max_new_tokens > limit:
            raise ValueError(
                f"prompts: prompt {index} has {len(ids)} tokens, which with max_new_tokens = "
                f"{one.max_new_tokens} exceeds the model's context of {limit}; shorten one of them"
            )
        stops = set(one.stop_token_ids)
        if tokenizer is not None and not one.ignore_eos:
            stops.add(tokenizer.eos_token_id)
        words = _bad_words(tokenizer, one)
        for sample in range(one.n):
            numbers = Uniforms(one.seed, index, sample)
            sequences.append(Sequence(index, sample, ids, one, frozenset(stops), numbers, words))
    return sequences


def _check_params(params: SamplingParams, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> None:
    if tokenizer is None:
        if not params.stop_token_ids and not params.ignore_eos:
            raise ValueError("stop_token_ids: without a tokenizer, say which tokens end a response, or set ignore_eos")
        if params.stop:
            raise ValueError("stop: stop texts need a tokenizer; give one, or use stop_token_ids")
    for name, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", tuple(params.logit_bias))):
        outside = [token for token in tokens if not 0 <= token < vocabulary]
        if outside:
            raise ValueError(f"{name}: token {outside[0]} is outside the vocabulary of {vocabulary}")


def _bad_words(tokenizer: PreTrainedTokenizerBase | None, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
    """Each text both at the beginning of a response and after a space, as token ids."""
    words: list[tuple[int, ...]] = []
    for word in params.bad_words:
        if not isinstance(word, str):
            words.append(tuple(word))
        elif tokenizer is None:
            raise ValueError(f"bad_words: {word!r} is text, which needs a tokenizer; give one, or token ids")
        else:
            words += [tuple(tokenizer(form, add_special_tokens=False)["input_ids"]) for form in (word, " " + word)]
    return tuple(dict.fromkeys(words))


def _encode(
    tokenizer: PreTrainedTokenizerBase | None, prompt: str | abc.Sequence[Message] | abc.Sequence[int], index: int
) -> tuple[int, ...]:
    if isinstance(prompt, dict):
        raise TypeError(f"prompts: prompt {index} is one message; expected a list of messages")
    if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
        ids = tuple(prompt)
    elif tokenizer is None:
        raise ValueError(f"prompts: prompt {index} is text, which needs a tokenizer; give one, or token ids")
    elif not prompt or (isinstance(prompt, str) and not prompt.strip()):
        ids = ()
    else:
        ids = encode_prompt(tokenizer, prompt)  # type: ignore[arg-type]
    if not ids:
        raise ValueError(f"prompts: prompt {index} is empty")
    return ids  # type: ignore[return-value]
