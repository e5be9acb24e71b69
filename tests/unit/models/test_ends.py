"""The tokens that end a turn, for generation, training and evaluation alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, GenerationConfig, PreTrainedTokenizerFast

from rlhf_fast import (
    Generator,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SamplingParams,
    SFTConfig,
    SFTTrainer,
    models,
)
from rlhf_fast.config import LoRAConfig
from rlhf_fast.data.batches import Example, pad
from rlhf_fast.models.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer

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


# Padding of reward models ---------------------------------------------------------------------------------------------


def padded_with_its_end(folder: Path, tmp_path: Path, spare: bool) -> Path:
    model, tokenizer = models.load(folder)
    if not spare:  # a tokenizer whose only special token is its end
        tokenizer = byte_tokenizer()
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] == "<eos>"]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<eos>",
            chat_template=tokenizer.chat_template,
        )  # fmt: skip
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.eos_token_id
    models.save(tmp_path / "base", model, tokenizer)
    return tmp_path / "base"


@pytest.mark.parametrize("r", [0, 4])
def test_a_reward_model_padded_with_its_end_scores_the_same_in_transformers(
    r: int, tiny_folder: Path, tmp_path: Path
) -> None:
    base = padded_with_its_end(tiny_folder, tmp_path, spare=True)
    data = [{"prompt": f"Say {i}", "chosen": "yes" * (i + 1), "rejected": "no"} for i in range(8)]
    config = RewardConfig(epochs=1, batch_size=4, lora=LoRAConfig(r=r), normalize_samples=0)
    RewardTrainer(base, data, tmp_path / "reward", config).train()
    folder = models.resolve(tmp_path / "reward")
    ours, tokenizer = models.load_reward(folder)
    assert tokenizer.pad_token == "<pad>" and tokenizer.eos_token == "<eos>"
    texts = ["Say it<eos>", "Say something longer than that<eos>"]
    ids = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    assert all(row[-1] == tokenizer.eos_token_id for row in ids)
    want = models.score_last(ours, pad([Example(row[:1], row[1:]) for row in ids], torch.device("cpu")))
    theirs = AutoModelForSequenceClassification.from_pretrained(folder if r == 0 else base, num_labels=1)
    if r:
        theirs = PeftModel.from_pretrained(theirs, folder)
        theirs.config.pad_token_id = tokenizer.pad_token_id  # an adapter's folder has no config of the model
    with torch.no_grad():
        got = theirs.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_without_a_token_to_pad_with_transformers_refuses_instead_of_misreading(
    tiny_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = models.reward_from(padded_with_its_end(tiny_folder, tmp_path, spare=False), LoRAConfig(r=0))
    models.pad_apart(model, tokenizer)
    assert model.config.pad_token_id is None and tokenizer.pad_token == tokenizer.eos_token
    ids = torch.tensor([[5, 6, tokenizer.eos_token_id], [7, 8, tokenizer.eos_token_id]])
    with pytest.raises(ValueError, match="batch sizes > 1 if no padding token"):
        model(input_ids=ids)
    with torch.no_grad():
        got = model(input_ids=ids[:1]).logits
        batch = pad([Example((5,), (6, tokenizer.eos_token_id))], torch.device("cpu"))
        torch.testing.assert_close(got, models.score_last(model, batch), rtol=0, atol=1e-6)
