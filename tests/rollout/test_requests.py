"""What requests may ask for besides tokens: penalties, biases, bans, ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from rlhf_fast import Generator, SamplingParams
from rlhf_fast.rollout.processors import process
from rlhf_fast.rollout.rollouts import Rollouts
from rlhf_fast.rollout.sampling import Uniforms
from rlhf_fast.rollout.sequence import Sequence

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


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0, -2.0, 3.0, 0.5]])
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])(torch.tensor([[3, 4, 4, 0, 1]]), logits)
    torch.testing.assert_close(processed([0, 1], repetition_penalty=1.3), theirs[0])


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
