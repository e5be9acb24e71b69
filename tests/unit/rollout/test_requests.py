"""What requests may ask for besides tokens: penalties, biases, bans, ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from rlhf_fast import Generator, SamplingParams
from rlhf_fast.data.records import read_prompts
from rlhf_fast.models.byte_tokenizer import byte_tokenizer
from rlhf_fast.rollout.processors import process
from rlhf_fast.rollout.requests import _bad_words
from rlhf_fast.rollout.rollouts import Rollouts
from rlhf_fast.rollout.sampling import Uniforms
from rlhf_fast.rollout.sequence import Sequence
from rlhf_fast.rollout.shown import Shown
from tests.unit.data.test_tokenize import metaspace

PROMPTS = [[5, 6, 7], [50, 60]]


def responses(rollouts: Rollouts) -> list[tuple[int, ...]]:
    return [tuple(s.response) for s in rollouts.sequences]


def processed(response: list[int], stops: frozenset[int] = frozenset(), **settings: Any) -> torch.Tensor:
    words = tuple(word for word in settings.get("bad_words", ()))
    sequence = Sequence(0, 0, (3, 4, 4), SamplingParams(**settings), stops, Uniforms(0, 0, 0), words, response)
    logits = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, 0.5])
    assert sequence.params.changes_logits
    process(logits, sequence)
    return logits


def test_only_what_changes_logits_says_so() -> None:
    assert not SamplingParams(temperature=0.5, top_p=0.9, seed=3).changes_logits
    changes: tuple[dict[str, Any], ...] = (
        {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"logit_bias": {3: -1.0}},
        {"bad_words": ((3,),)}, {"min_new_tokens": 1},
    )  # fmt: skip
    assert all(SamplingParams(**change).changes_logits for change in changes)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0, -2.0, 3.0, 0.5]])
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])(torch.tensor([[3, 4, 4, 0, 1]]), logits)
    torch.testing.assert_close(processed([0, 1], repetition_penalty=penalty), theirs[0])


def test_presence_and_frequency_penalties_count_the_response_alone() -> None:
    got = processed([2, 5, 5], presence_penalty=0.5, frequency_penalty=0.25)
    torch.testing.assert_close(got, torch.tensor([1.0, -1.0, 2.0 - 0.75, -2.0, 3.0, 0.5 - 1.0]))
    untouched = processed([], presence_penalty=0.5, frequency_penalty=0.25)
    torch.testing.assert_close(untouched, torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, 0.5]))


def test_biases_bans_and_least_lengths() -> None:
    torch.testing.assert_close(
        processed([], logit_bias={1: 4.0, 0: float("-inf")}), torch.tensor([-torch.inf, 3.0, 2.0, -2.0, 3.0, 0.5])
    )
    banned = [int(i) for i in processed([2], bad_words=((4,), (2, 5), (0, 1))).isinf().nonzero()]
    assert banned == [4, 5], "a word of two tokens is banned only where it would be completed"
    stops = frozenset({0, 3})
    assert processed([1], stops, min_new_tokens=2).isinf().nonzero().flatten().tolist() == [0, 3]
    assert not processed([1, 1], stops, min_new_tokens=2).isinf().any()


def test_what_is_changed_is_obeyed_and_the_logprobs_are_those_of_training(tiny: tuple[Any, Any]) -> None:
    generator = Generator(*tiny)
    free = SamplingParams(n=3, max_new_tokens=12, ignore_eos=True, seed=1)
    plain = generator.generate(PROMPTS, free)
    seen = {token for r in responses(plain) for token in r}
    ban = sorted(seen)[: len(seen) // 2]
    settings = {**vars(free), "logit_bias": dict.fromkeys(ban, float("-inf"))}
    banned = generator.generate(PROMPTS, SamplingParams(**settings))
    assert not {token for r in responses(banned) for token in r} & set(ban)
    from rlhf_fast import models
    from rlhf_fast.data.batches import pad

    with torch.no_grad():
        truth, _ = models.response_logprobs(tiny[0], pad(banned.examples()))
    mask = banned.response_mask
    torch.testing.assert_close(banned.logprobs[mask], truth, rtol=0, atol=1e-4)
    assert (banned.sampled_logprobs[mask] > banned.logprobs[mask]).all(), "what was banned made the rest likelier"
    mixed = generator.generate(PROMPTS, [free, SamplingParams(**settings)])
    assert responses(mixed) == responses(plain)[:3] + responses(banned)[3:]


def test_sampled_logprobs_are_under_what_was_sampled_from(tiny: tuple[Any, Any]) -> None:
    generator = Generator(*tiny)
    params = SamplingParams(n=4, top_k=3, max_new_tokens=8, ignore_eos=True)
    rollouts = generator.generate(PROMPTS, params)
    model, rows = tiny[0], []
    for sequence in rollouts.sequences:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence.tokens(0, len(sequence))])).logits[0]
        for i, token in enumerate(sequence.response):
            top = logits[len(sequence.prompt) - 1 + i].topk(3)
            assert token in top.indices
            rows.append(torch.log_softmax(top.values, 0)[top.indices.tolist().index(token)])
    got = rollouts.sampled_logprobs[rollouts.response_mask]
    torch.testing.assert_close(got, torch.stack(rows), rtol=0, atol=1e-4)
    greedy = generator.generate(PROMPTS, SamplingParams(temperature=0.0, max_new_tokens=4, ignore_eos=True))
    assert greedy.sampled_logprobs.abs().max() < 1e-6


def test_an_end_token_cannot_come_before_the_least_length(tiny: tuple[Any, Any]) -> None:
    stops = tuple(range(4, 200))
    params = SamplingParams(n=8, max_new_tokens=12, min_new_tokens=5, stop_token_ids=stops)
    lengths = {len(r) for r in responses(Generator(*tiny).generate(PROMPTS, params))}
    assert min(lengths) == 6 and all(n >= 6 for n in lengths)


def test_a_stop_text_ends_the_response_and_is_not_part_of_the_text(tiny: tuple[Any, Any]) -> None:
    generator = Generator(*tiny)
    free = SamplingParams(max_new_tokens=40, ignore_eos=True, seed=3)
    text = generator.generate(["Hi"], free).texts[0]
    stop = next(text[i : i + 2] for i in range(3, len(text) - 2) if text[i : i + 2].isascii())
    rollouts = generator.generate(["Hi"], SamplingParams(**{**vars(free), "stop": (stop, "never there")}))
    assert rollouts.texts == [text[: text.index(stop)]]
    assert rollouts.finish_reasons == ["stop"]
    assert len(responses(rollouts)[0]) < 40
    with pytest.raises(ValueError, match="stop: stop texts need a tokenizer"):
        Generator(tiny[0]).generate([[5]], SamplingParams(stop=("a",), ignore_eos=True))


def test_bad_words_may_be_texts(tiny: tuple[Any, Any]) -> None:
    generator = Generator(*tiny)
    free = SamplingParams(max_new_tokens=40, ignore_eos=True, seed=3)
    text = generator.generate(["Hi"], free).texts[0]
    word = next(text[i : i + 2] for i in range(3, len(text) - 2) if text[i : i + 2].isascii())
    without = generator.generate(["Hi"], SamplingParams(**{**vars(free), "bad_words": (word,)})).texts[0]
    assert word not in without and without[: text.index(word)] == text[: text.index(word)]
    with pytest.raises(ValueError, match="bad_words: 'a' is text, which needs a tokenizer"):
        Generator(tiny[0]).generate([[5]], SamplingParams(bad_words=("a",), ignore_eos=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_token_ids": (260,)}, "stop_token_ids: token 260 is outside the vocabulary of 260"),
        ({"logit_bias": {-1: 2.0}}, "logit_bias: token -1 is outside the vocabulary of 260"),
    ],
)
def test_tokens_outside_the_vocabulary_are_named(tiny: tuple[Any, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generator(*tiny).generate(["Hi"], SamplingParams(**settings))


@pytest.mark.parametrize(
    "filters",
    [{"temperature": 1.5}, {"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.3}, {"logit_bias": {5: 3.0}}],
    ids=str,
)
@pytest.mark.seconds(2)
def test_first_tokens_come_as_often_as_they_should(tiny: tuple[Any, Any], filters: dict[str, Any]) -> None:
    from scipy.stats import chisquare

    count = 3000
    params = SamplingParams(n=count, max_new_tokens=1, ignore_eos=True, **filters)
    tokens = torch.tensor(responses(Generator(*tiny).generate([[5, 6]], params))).flatten()
    with torch.no_grad():
        logits = tiny[0](input_ids=torch.tensor([[5, 6]])).logits[0, -1].double()
    for token, bias in filters.get("logit_bias", {}).items():
        logits[token] += bias
    p = torch.softmax(logits / filters.get("temperature", 1.0), 0)
    ranked = p.argsort(descending=True)
    before = p[ranked].cumsum(0) - p[ranked]
    keep = torch.ones_like(p, dtype=torch.bool)
    keep[ranked[filters.get("top_k", len(p)) :]] = False
    keep[ranked[before >= filters.get("top_p", 1.0)]] = False
    keep &= p >= filters.get("min_p", 0.0) * p.max()
    expected = torch.where(keep, p, 0) / p[keep].sum() * count
    seen = torch.bincount(tokens, minlength=len(p)).double()
    assert seen[~keep].sum() == 0
    usual = expected >= 5  # the rest together, as a chi-square test needs
    observed, wanted = ([*x[usual].tolist(), float(x[~usual].sum())] for x in (seen, expected))
    pairs = [(o, w) for o, w in zip(observed, wanted, strict=True) if w > 0]
    assert chisquare([o for o, _ in pairs], [w for _, w in pairs]).pvalue > 1e-4


# Borders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ((260,), ValueError, "bad_words: token 260 is outside the vocabulary of 260"),
        ((5, -1), ValueError, "bad_words: token -1 is outside the vocabulary of 260"),
        ((5, 6.0), TypeError, r"bad_words: 6\.0 is no token id; expected a whole number"),
        ((True,), TypeError, "bad_words: True is no token id; expected a whole number"),
    ],
)
def test_ids_of_bad_words_are_checked(
    tiny: tuple[Any, Any], word: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Generator(*tiny).generate(["Hi"], SamplingParams(bad_words=(word,)))


def test_a_bad_word_is_banned_within_a_text_as_well_whatever_the_tokenizer_puts_before_a_first_word() -> None:
    tokenizer = metaspace("first")
    (word, spaced) = (tokenizer.convert_tokens_to_ids(token) for token in ("hello", "▁hello"))
    words = _bad_words(tokenizer, SamplingParams(bad_words=("hello",)), 100)
    assert (word,) in words and (spaced,) in words


def test_stop_texts_wait_for_the_least_length(tiny: tuple[Any, Any]) -> None:
    generator = Generator(*tiny)
    free = SamplingParams(max_new_tokens=60, ignore_eos=True, seed=3)
    text = generator.generate(["Hi"], free).texts[0]
    tokens = responses(generator.generate(["Hi"], free))[0]
    stop = next(c for c in text if c.isascii() and text.count(c) > 1)
    ends = [i + 1 for i in range(len(tokens)) if generator.tokenizer.decode([tokens[i]]) == stop]  # type: ignore[union-attr]
    for least, end in ((0, ends[0]), (ends[0] - 1, ends[0]), (ends[0], ends[1])):
        rollouts = generator.generate(["Hi"], replace(free, stop=(stop,), min_new_tokens=least))
        assert len(responses(rollouts)[0]) == end, "a stop text counts from the token after the least length on"
        assert rollouts.texts[0] == generator.tokenizer.decode(tokens[: end - 1])  # type: ignore[union-attr]


def test_the_text_of_a_special_token_stops_like_the_token(tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1]
    generator = Generator(*tiny)
    free = SamplingParams(n=64, max_new_tokens=40, ignore_eos=True, seed=1)
    user = tokenizer.convert_tokens_to_ids("<user>")
    assert any(user in r for r in responses(generator.generate(["Hi"], free)))
    by_text = generator.generate(["Hi"], replace(free, stop=("<user>",)))
    by_token = generator.generate(["Hi"], replace(free, stop_token_ids=(user,)))
    assert responses(by_text) == responses(by_token) and by_text.finish_reasons == by_token.finish_reasons
    assert any(r[-1] == user for r in responses(by_text)) and all(user not in r[:-1] for r in responses(by_text))
    with pytest.raises(ValueError, match="stop: '<user>Hi' holds the special token '<user>' beside other text"):
        generator.generate(["Hi"], SamplingParams(stop=("<user>Hi",)))


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, None])
def test_yarn_reaches_past_the_table_that_it_stretches(family_config: Any, rope: dict[str, Any] | None) -> None:
    from rlhf_fast import models

    config = family_config("llama")
    if rope is not None:
        config.rope_parameters = {**config.rope_parameters, **rope}
    generator = Generator(*models.load(config))
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    if rope is None:
        with pytest.raises(ValueError, match="exceeds the model's context of 128"):
            generator.generate([[5] * 200], params)
        return
    rollouts = generator.generate([[5 + i % 200 for i in range(200)]], params)
    (example,) = rollouts.examples()
    with torch.no_grad():
        logits = generator.model(input_ids=torch.tensor([example.prompt + example.response])).logits[0]
    truth = torch.log_softmax(logits, -1)[199:-1].gather(1, torch.tensor(example.response)[:, None])[:, 0]
    torch.testing.assert_close(rollouts.logprobs[rollouts.response_mask], truth, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="exceeds the model's context of 512"):
        generator.generate([[5] * 510], params)


@pytest.mark.parametrize("stop", [(), ("never there",), ("ab", "a"), ("\ufffd",)])
def test_a_stream_gives_whole_characters_and_takes_nothing_back(tiny: tuple[Any, Any], stop: tuple[str, ...]) -> None:
    """Also where the bytes are no text at all, or a character of four bytes that comes one byte at a time."""
    model, tokenizer = tiny
    generator = Generator(model, tokenizer)
    face = tokenizer("a\U0001f600b€c", add_special_tokens=False)["input_ids"]
    order = {(*tokenizer("q", add_special_tokens=False)["input_ids"], *face[:i]): face[i] for i in range(len(face))}
    for params in (
        SamplingParams(n=6, max_new_tokens=30, ignore_eos=True, seed=5, stop=stop),
        *(SamplingParams(logit_bias={token: 1e4}, temperature=0.0, max_new_tokens=1) for token in order.values()),
    ):
        shown: dict[int, str] = {}
        for piece in generator.stream(["q"], params):
            before = shown.get(piece.sample, "")
            assert piece.text.startswith(before), "nothing is taken back"
            assert piece.finish_reason or not piece.text.endswith("\ufffd"), "no half character"
            assert piece.finish_reason or not any(
                piece.text.endswith(text[:n]) for text in stop for n in range(1, len(text))
            ), "nothing that may become a stop text"
            shown[piece.sample] = piece.text
        assert [shown[i] for i in range(params.n)] == generator.generate(["q"], params).texts


def test_characters_of_several_tokens_come_at_once() -> None:
    tokenizer = byte_tokenizer()
    text = "a\U0001f600b€ ü"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    sequence = Sequence(0, 0, (5,), SamplingParams(max_new_tokens=50), frozenset(), Uniforms(0, 0, 0))
    shown, steps = Shown(tokenizer, sequence), []
    for i in ids:
        sequence.response.append(i)
        steps.append(shown.grown())
    assert list(dict.fromkeys(steps)) == [text[:n] for n in (1, 2, 3, 4, 5, 6)]
    sequence.response.append(ids[1])  # a character that is cut off
    assert shown.grown() == text
    sequence.finish_reason = "length"
    assert shown.grown() == text + "\ufffd"


@pytest.mark.parametrize("temperature", [2.0**-149, 1e-40, 1e-30, 1e-8])
def test_the_smallest_temperatures_are_as_good_as_none(tiny: tuple[Any, Any], temperature: float) -> None:
    generator = Generator(*tiny)
    greedy = generator.generate(PROMPTS, SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True))
    found = generator.generate(PROMPTS, SamplingParams(temperature=temperature, max_new_tokens=12, ignore_eos=True))
    assert responses(found) == responses(greedy) and set(found.finish_reasons) == {"length"}
    assert found.logprobs.abs().max() == 0 and found.entropy.abs().max() == 0
    with pytest.raises(ValueError, match=r"temperature: 1e-60; expected 0\.0 \(greedy\) or at least 1\.4e-45"):
        SamplingParams(temperature=1e-60)


@pytest.mark.parametrize(
    "made",
    [
        torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32), np.array, lambda ids: np.array(ids, np.uint16),
        tuple, lambda ids: [np.int64(i) for i in ids], lambda ids: torch.tensor([0, *ids])[1:],
    ],
)  # fmt: skip
def test_prompts_may_be_tensors_and_arrays(tiny: tuple[Any, Any], made: Any) -> None:
    generator, params = Generator(*tiny), SamplingParams(max_new_tokens=4, seed=2)
    plain = generator.generate(PROMPTS, params)
    found = generator.generate([made(prompt) for prompt in PROMPTS], params)
    assert responses(found) == responses(plain) and torch.equal(found.input_ids, plain.input_ids)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (torch.tensor([[5, 6], [7, 8]]), TypeError, "prompts: got one Tensor; expected a list of prompts"),
        (
            [torch.tensor([[5, 6]])],
            TypeError,
            r"prompts: prompt 0 is .* with shape \(1, 2\); expected text",
        ),
        ([torch.tensor([0.5])], TypeError, "prompts: prompt 0 is .* of float32 with shape"),
        ([[True, False]], TypeError, "prompts: prompt 0 is list of bool"),
        ([[[1, 2], [3]]], TypeError, "prompts: prompt 0 is no list of token ids"),
        ([[]], ValueError, "prompts: prompt 0 is empty"),
        ([torch.tensor([], dtype=torch.int64)], ValueError, "prompts: prompt 0 is empty"),
        (
            [[{"role": "user", "content": None}]],
            ValueError,
            "prompt 0: the content of a message of prompt should be text",
        ),
        (
            [[{"role": "user"}]],
            ValueError,
            "prompt 0: the content of a message of prompt should be text",
        ),
        (
            [[{"who": "human", "text": "Hi"}]],
            ValueError,
            'prompt 0: a message of prompt should be {"role"',
        ),
    ],
)
def test_prompts_that_are_none_are_named(
    tiny: tuple[Any, Any], prompts: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Generator(*tiny).generate(prompts)


def test_settings_that_are_none_are_named(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="params: got int; expected SamplingParams, or a dict such as"):
        Generator(*tiny).generate(["Hi"], 2)  # type: ignore[arg-type]


def test_a_record_brings_its_tools_and_settings(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    tokenizer.chat_template = "{{ tools[0].name if tools else '' }}{{ word }}" + str(tokenizer.chat_template)
    row = {"prompt": "Hi", "tools": [{"name": "clock"}], "chat_template_kwargs": {"word": "!"}}
    generator = Generator(model, tokenizer)
    plain, own = (generator.generate(read_prompts([{"prompt": "Hi"}, row])).examples()[i].prompt for i in (0, 1))
    assert tokenizer.decode(own) == "clock!" + tokenizer.decode(plain)
