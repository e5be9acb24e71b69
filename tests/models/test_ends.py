"""The tokens that end a turn, for generation, training and evaluation alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from rlhf_fast import Generator, PPOConfig, PPOTrainer, SamplingParams, SFTConfig, SFTTrainer, models
from rlhf_fast.models.byte_tokenizer import CHAT_TEMPLATE

PAD, EOS, USER, ASSISTANT = range(4)


@pytest.mark.parametrize(
    ("generation", "config", "template", "ends"),
    [
        (None, None, CHAT_TEMPLATE, {EOS}),
        ([50, 60], None, CHAT_TEMPLATE, {EOS, 50, 60}),  # as Gemma 3 has several
        (50, [70, 71], CHAT_TEMPLATE, {EOS, 50, 70, 71}),
        (None, None, CHAT_TEMPLATE.replace("<eos>", "<pad>"), {EOS, PAD}),
        (None, None, None, {EOS}),
        (None, 99_999, CHAT_TEMPLATE, {EOS}),  # a default that is outside of the vocabulary is never sampled
    ],
)
def test_the_ends_are_those_of_all_who_know_one(
    tiny: tuple[Any, Any], generation: Any, config: Any, template: str | None, ends: set[int]
) -> None:
    model, tokenizer = tiny
    tokenizer.chat_template = template
    model.generation_config = GenerationConfig(eos_token_id=generation)
    model.config.eos_token_id = config
    assert models.end_tokens(model, tokenizer) == ends


def lively(tiny: tuple[Any, Any]) -> tuple[Any, Any]:
    """A tokenizer whose template ends turns otherwise than it says, and a model that names more ends."""
    model, tokenizer = tiny
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "<pad>")
    model.generation_config.eos_token_id = [EOS, *range(150, 180)]
    return model, tokenizer


def test_a_response_ends_at_each_of_them_unless_that_is_turned_off(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = lively(tiny)
    ends = models.end_tokens(model, tokenizer)
    assert ends == {EOS, PAD, *range(150, 180)}
    params = SamplingParams(n=64, max_new_tokens=60, seed=1)
    found = Generator(model, tokenizer).generate(["Hi"], params)
    last = {s.response[-1] for s in found.sequences if s.finish_reason == "stop"}
    assert last <= ends and len(last) > 5
    assert not any(ends & {*s.response[:-1]} for s in found.sequences)
    free = SamplingParams(n=64, max_new_tokens=60, seed=1, ignore_eos=True)
    assert {s.finish_reason for s in Generator(model, tokenizer).generate(["Hi"], free).sequences} == {"length"}
    late = SamplingParams(n=64, max_new_tokens=60, seed=1, min_new_tokens=20)
    assert min(len(s.response) for s in Generator(model, tokenizer).generate(["Hi"], late).sequences) > 20


def test_what_is_learned_and_what_is_sampled_end_alike(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = lively(tiny)
    models.save(tmp_path / "base", model, tokenizer)
    rows = [{"prompt": f"q{i}", "completion": "answer"} for i in range(4)]
    sft = SFTTrainer(tmp_path / "base", rows, tmp_path / "sft", SFTConfig(samples=0))
    ends = {conversation.input_ids[-1] for of in sft.training for conversation in of}
    assert ends == {PAD}, "the token that the template writes, not the tokenizer's"
    ppo = PPOTrainer(
        tmp_path / "base",
        lambda prompts, responses: [0.0] * len(responses),
        [{"prompt": "a"}, {"prompt": "b"}],
        tmp_path / "ppo",
        PPOConfig(steps=1, prompts_per_step=2, samples_per_prompt=32, max_new_tokens=60, minibatches=1),
    )
    sampled, _ = ppo.sampler.take(1)
    last = {s.response[-1] for s in sampled.rollouts.sequences if s.finish_reason == "stop"}
    assert last <= models.end_tokens(ppo.model, ppo.tokenizer) and len(last) > 3
