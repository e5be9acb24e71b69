"""Every setting of SamplingParams changes what is sampled as it says, seen beside decoding by hand with transformers.

A setting that is in no table fails `test_every_setting_of_sampling_is_in_the_table`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from rlhf_fast import Generator, SamplingParams, models
from tests.conftest import SMALL

PROMPT = [40, 41, 42, 41]
LENGTH = 8
EOS = 1
Change = Callable[[torch.Tensor, list[int]], torch.Tensor]  # of logits (V,), after a response


class World:
    """A model, and what is likeliest of it by hand."""

    def __init__(self) -> None:
        self.model, self.tokenizer = models.load(LlamaConfig(**SMALL), seed=1)
        self.generator = Generator(self.model, self.tokenizer)
        self.plain = self.greedy()

    def logits(self, response: list[int]) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self.model(input_ids=torch.tensor([PROMPT + response])).logits[0, -1]
        return found.double()

    def greedy(self, change: Change = lambda logits, _: logits, length: int = LENGTH) -> list[int]:
        response: list[int] = []
        while len(response) < length and response[-1:] != [EOS]:
            response.append(int(change(self.logits(response), response).argmax()))
        return response

    def sample(self, **params: Any) -> list[list[int]]:
        given = SamplingParams(**{"max_new_tokens": LENGTH, "temperature": 0.0, **params})
        self.rollouts = self.generator.generate([PROMPT], given)
        return [list(example.response) for example in self.rollouts.examples()]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def with_bias(tokens: dict[int, float]) -> Change:
    def change(logits: torch.Tensor, _: list[int]) -> torch.Tensor:
        logits = logits.clone()
        for token, bias in tokens.items():
            logits[token] += bias
        return logits

    return change


def penalised(repetition: float = 1.0, presence: float = 0.0, frequency: float = 0.0) -> Change:
    def change(logits: torch.Tensor, response: list[int]) -> torch.Tensor:
        logits = logits.clone()
        if repetition != 1.0:
            for token in {*PROMPT, *response}:
                logits[token] *= 1 / repetition if logits[token] > 0 else repetition
        for token in set(response):
            logits[token] -= presence + frequency * response.count(token)
        return logits

    return change


def differs_from_the_plain(world: World, expected: list[int], **params: Any) -> None:
    assert expected != world.plain, "the setting is to change something"
    assert world.sample(**params) == [expected]


def n(world: World) -> None:
    responses = world.sample(n=3, temperature=1.0)
    assert len(responses) == 3 and len(set(map(tuple, responses))) == 3


def temperature(world: World) -> None:
    """Of what is drawn the model's own log-probability is told, which depends on it, whatever else changes logits."""
    for others in ({}, {"logit_bias": {77: 2.0}, "presence_penalty": 1.0}):
        (response,) = world.sample(temperature=0.6, **others)
        by_hand = [
            float(torch.log_softmax(world.logits(response[:t]) / 0.6, -1)[token]) for t, token in enumerate(response)
        ]
        assert world.rollouts.logprobs[world.rollouts.response_mask].tolist() == pytest.approx(by_hand, abs=1e-3)
        assert response != world.plain
    assert world.sample(temperature=0.0) == [world.plain]


def cut_to_the_likeliest(**params: Any) -> Callable[[World], None]:
    def check(world: World) -> None:
        seeds = range(4)
        assert any(world.sample(temperature=1.0, seed=seed) != [world.plain] for seed in seeds)
        assert all(world.sample(temperature=1.0, seed=seed, **params) == [world.plain] for seed in seeds)

    return check


def repetition_penalty(world: World) -> None:
    differs_from_the_plain(world, world.greedy(penalised(repetition=3.0)), repetition_penalty=3.0)


def presence_penalty(world: World) -> None:
    differs_from_the_plain(world, world.greedy(penalised(presence=50.0)), presence_penalty=50.0)


def frequency_penalty(world: World) -> None:
    """Of a token that is wished for: more each time that it is said, unlike by the presence penalty."""
    wish = {77: 12.0}

    def both(penalty: Change) -> Change:
        return lambda logits, response: with_bias(wish)(penalty(logits, response), response)

    expected = world.greedy(both(penalised(frequency=3.0)))
    assert expected != world.greedy(both(penalised(presence=3.0))), "the two penalties are to be told apart"
    assert world.sample(frequency_penalty=3.0, logit_bias=wish) == [expected]


def logit_bias(world: World) -> None:
    bias = {world.plain[0]: -50.0, 77: 3.0}
    differs_from_the_plain(world, world.greedy(with_bias(bias)), logit_bias=bias)


def bad_words(world: World) -> None:
    """The second token is not said after the first."""
    first, second = world.plain[:2]

    def change(logits: torch.Tensor, response: list[int]) -> torch.Tensor:
        return with_bias({second: -torch.inf})(logits, response) if response[-1:] == [first] else logits

    differs_from_the_plain(world, world.greedy(change), bad_words=((first, second),))


def max_new_tokens(world: World) -> None:
    assert world.sample(max_new_tokens=3) == [world.plain[:3]]
    assert world.rollouts.finish_reasons == ["length"]


def min_new_tokens(world: World) -> None:
    """An end that is wished for at once comes after three tokens."""
    assert world.sample(logit_bias={EOS: 99.0}) == [[EOS]]
    assert world.sample(logit_bias={EOS: 99.0}, min_new_tokens=3) == [[*world.plain[:3], EOS]]


def ignore_eos(world: World) -> None:
    assert world.sample(logit_bias={EOS: 99.0}, ignore_eos=True) == [[EOS] * LENGTH]


def stop_token_ids(world: World) -> None:
    token = world.plain[2]
    assert world.sample(stop_token_ids=(token,)) == [world.plain[: world.plain.index(token) + 1]]
    assert world.rollouts.finish_reasons == ["stop"]


def stop(world: World) -> None:
    """At a letter that is wished for after the second token."""
    letter = world.tokenizer("q", add_special_tokens=False)["input_ids"][0]
    (whole,) = world.sample(logit_bias={letter: 99.0})
    assert whole == [letter] * LENGTH and world.rollouts.texts == ["q" * LENGTH]
    assert world.sample(logit_bias={letter: 99.0}, stop=("qqq",)) == [[letter] * 3]
    assert world.rollouts.texts == [""] and world.rollouts.finish_reasons == ["stop"]


def seed(world: World) -> None:
    assert world.sample(temperature=1.0, seed=5) == world.sample(temperature=1.0, seed=5)
    assert world.sample(temperature=1.0, seed=5) != world.sample(temperature=1.0, seed=6)


TABLE: dict[str, Callable[[World], None]] = {
    "n": n,
    "temperature": temperature,
    "top_k": cut_to_the_likeliest(top_k=1),
    "top_p": cut_to_the_likeliest(top_p=1e-6),
    "min_p": cut_to_the_likeliest(min_p=0.9999),
    "repetition_penalty": repetition_penalty,
    "presence_penalty": presence_penalty,
    "frequency_penalty": frequency_penalty,
    "logit_bias": logit_bias,
    "bad_words": bad_words,
    "max_new_tokens": max_new_tokens,
    "min_new_tokens": min_new_tokens,
    "stop_token_ids": stop_token_ids,
    "stop": stop,
    "ignore_eos": ignore_eos,
    "seed": seed,
}


@pytest.mark.parametrize("name", TABLE)
def test_a_setting_of_sampling_does_what_it_names(name: str, world: World) -> None:
    TABLE[name](world)


def test_every_setting_of_sampling_is_in_the_table() -> None:
    """A new one is to be added, with what it does."""
    assert {f.name for f in fields(SamplingParams)} == set(TABLE)
