from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BloomConfig, MistralConfig

from rlhf_fast import models
from rlhf_fast.config import LoRAConfig
from rlhf_fast.data.batches import LONGEST_ROW, Example, pad
from rlhf_fast.data.conversations import Tokenized, batch_of
from rlhf_fast.models.forward import check_head
from tests.conftest import SMALL

EXAMPLES = [
    Example((5, 6, 7, 8), (9, 10, 1)),
    Example(tuple(range(20, 40)), (30,)),
    Example((5,), (7, 0, 9, 9, 8, 1)),  # 0 is the padding: a policy may sample it all the same
    Example((11, 12, 13), (14, 15)),
]


def logprobs_of(model: nn.Module, example: Example, temperature: float = 1.0) -> torch.Tensor:
    """The definition: one sequence alone, all its logits, and those at the places before its response tokens."""
    logits = model(input_ids=torch.tensor([example.prompt + example.response])).logits[0].float() / temperature
    table = torch.log_softmax(logits, dim=-1)[len(example.prompt) - 1 : -1]
    return table.gather(-1, torch.tensor(example.response)[:, None]).squeeze(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_logprobs_are_those_of_the_models_own_logits(family: Any, temperature: float) -> None:
    model, _ = models.load(family)
    with torch.no_grad():
        got, entropy = models.response_logprobs(model, pad(EXAMPLES), temperature)
        expected = torch.cat([logprobs_of(model, example, temperature) for example in EXAMPLES])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert got.dtype == entropy.dtype == torch.float32
    assert got.std() > 1e-3, "a model so even shows nothing"


def test_an_adapter_reaches_every_family_and_gets_a_gradient(family: Any) -> None:
    model, _ = models.load(family)
    policy = models.trainable(model, LoRAConfig(r=2, alpha=4))
    models.response_logprobs(policy, pad(EXAMPLES))[0].sum().backward()
    adapters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)
    for name, parameter in adapters.items():  # A has no gradient before B has left zero
        assert parameter.grad is not None
        assert ("lora_B" not in name) or parameter.grad.abs().sum() > 0, name


def test_soft_caps_scales_and_biases_are_read_from_the_model(family_config: Callable[..., Any]) -> None:
    heads = {name: models.output_head(models.load(family_config(name))[0]) for name in ("gemma2", "granite", "cohere")}
    assert (heads["gemma2"].softcap, heads["gemma2"].logit_scale) == (1.5, 1.0)
    assert (heads["granite"].softcap, heads["granite"].logit_scale) == (None, 0.25)
    assert (heads["cohere"].softcap, heads["cohere"].logit_scale) == (None, 0.25)
    assert models.output_head(models.load(family_config("phi"))[0]).bias is not None


def test_a_model_whose_logits_are_changed_in_an_unknown_way_is_refused(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny

    def squared(module: nn.Module, arguments: Any, output: Any) -> Any:
        output.logits = output.logits + output.logits.square()
        return output

    check_head(model)
    model.register_forward_hook(squared)
    with pytest.raises(ValueError, match="LlamaForCausalLM makes its logits in a way not known here"):
        check_head(model)


def test_a_model_that_is_no_decoder_is_refused_by_name() -> None:
    config = BertConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="BertLMHeadModel"):
        models.load(config)


def test_logprobs_values_and_scores_do_not_depend_on_padding_company_or_order(
    tiny: tuple[Any, Any], tiny_folder: Any
) -> None:
    model, _ = tiny
    reward, _ = models.reward_from(tiny_folder, LoRAConfig(r=0))
    value_head = nn.Linear(model.config.hidden_size, 1)

    @torch.no_grad()
    def outputs(examples: list[Example]) -> list[tuple[torch.Tensor, ...]]:
        batch = pad(examples)
        logprobs, entropy = models.response_logprobs(model, batch)
        values = value_head(models.response_states(model, batch)).squeeze(-1)
        lengths = [len(example.response) for example in examples]
        scores = models.score_last(reward, batch)
        return list(
            zip(logprobs.split(lengths), entropy.split(lengths), values.split(lengths), scores.unbind(), strict=True)
        )

    alone = [outputs([example])[0] for example in EXAMPLES]
    order = [2, 0, 3, 1]
    shuffled = outputs([EXAMPLES[i] for i in order])
    padded = outputs([*EXAMPLES, Example(tuple(range(4, 100)), (5,))])
    for row, expected in enumerate(alone):
        for got in (shuffled[order.index(row)], padded[row]):
            for mine, other in zip(expected, got, strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


ONE_PROMPT = [
    Example((5, 6, 7, 8), (9, 10, 1)),
    Example((5, 6, 7, 8), (30,)),
    Example((5,), (7, 0, 9, 9, 8, 1)),
    Example((5, 6, 7, 8), (14, 15, 0, 3)),
]


def test_a_prompt_that_is_read_once_gives_the_same_as_one_for_each_response(family: Any) -> None:
    """Values and gradients, in every family; a window is as wide as what may share."""
    model, _ = models.load(family)
    examples = [ONE_PROMPT[i] for i in (0, 1, 3, 2)]
    longest = models.longest_shared(model)
    assert longest == (family.sliding_window if family.model_type == "gemma2" else LONGEST_ROW)

    def outputs(shared: int) -> tuple[torch.Tensor, ...]:
        batch = pad(examples, longest_shared=shared)
        assert len(batch.input_ids) == (2 if shared else 4)
        logprobs, entropy = models.response_logprobs(model, batch)
        model.zero_grad()
        (logprobs * torch.arange(len(logprobs))).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return logprobs, entropy, gradient / gradient.abs().max()

    for one, all_of_them in zip(outputs(longest), outputs(0), strict=True):
        torch.testing.assert_close(one, all_of_them, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_heeds_no_positions_shares_nothing(tiny: tuple[Any, Any], dtype: torch.dtype) -> None:
    model, _ = models.load(BloomConfig(vocab_size=260, hidden_size=32, n_layer=1, n_head=2))
    assert models.longest_shared(model.to(dtype)) == 0
    assert models.longest_shared(tiny[0].to(dtype)) == LONGEST_ROW  # nor does rounding look like not heeding


def test_packed_sequences_have_the_states_they_have_alone(family: Any) -> None:
    """In every family whose attention is transformers' to choose; Gemma 2 with its soft cap brings its own."""
    model, _ = models.load(family)
    assert models.longest_packed(model) == (0 if family.model_type == "gemma2" else sys.maxsize)
    assert models.longest_packed(model.to(torch.bfloat16)) == (0 if family.model_type == "gemma2" else sys.maxsize)
    if family.model_type == "gemma2":
        return
    model, implementation = model.float(), model.config._attn_implementation
    rows = [Tokenized(e.prompt + e.response, (False, *[True] * (len(e) - 1))) for e in EXAMPLES]
    with torch.no_grad():
        alone = torch.cat([models.response_states(model, batch_of([row])) for row in rows])
        packed = models.response_states(model, batch_of(rows, packed=True))
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    assert model.config._attn_implementation == implementation


def test_what_is_packed_is_no_longer_than_the_models_window() -> None:
    model, _ = models.load(MistralConfig(**SMALL, sliding_window=8))
    assert models.longest_packed(model) == models.longest_shared(model) == 8


def test_a_sequence_longer_than_the_window_keeps_it_beside_others_that_share_a_prompt() -> None:
    model, _ = models.load(MistralConfig(**SMALL, sliding_window=8))
    examples = [ONE_PROMPT[0], ONE_PROMPT[1], Example(tuple(range(20, 40)), (30, 31))]
    with torch.no_grad():
        alone = torch.cat([models.response_states(model, pad([example])) for example in examples])
        together = models.response_states(model, pad(examples, longest_shared=models.longest_shared(model)))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_model_whose_attention_is_its_own_packs_nothing() -> None:
    model, _ = models.load(BloomConfig(vocab_size=260, hidden_size=32, n_layer=1, n_head=2))
    assert models.longest_packed(model) == 0


def test_scores_of_responses_that_share_a_prompt_are_their_own(tiny_folder: Any) -> None:
    reward, _ = models.reward_from(tiny_folder, LoRAConfig(r=0))
    with torch.no_grad():
        alone = torch.cat([models.score_last(reward, pad([example])) for example in ONE_PROMPT])
        together = models.score_last(reward, pad(ONE_PROMPT, longest_shared=models.longest_shared(reward)))
    assert alone.std() > 1e-3
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_the_first_response_token_is_predicted_from_the_last_prompt_token(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    example = Example((5, 6, 7), (8, 9))
    with torch.no_grad():
        states = models.response_states(model, pad([example]))
        hidden = models.hidden_states(model, torch.tensor([[5, 6, 7, 8]]))[0]
    torch.testing.assert_close(states, hidden[[2, 3]], rtol=0, atol=1e-6)


def test_the_end_token_is_a_response_token_and_padding_is_not() -> None:
    batch = pad([Example((5, 6), (7, 1)), Example((5,), (1,))])
    assert batch.predicted_at.tolist() == [1, 2, 4] and batch.last.tolist() == [3, 5]
    assert batch.response_tokens.tolist() == [7, 1, 1]
    assert batch.cu_seqlens.tolist() == [0, 2, 3]


def test_an_adapter_on_the_output_layer_is_part_of_it(family_config: Callable[..., Any], nudge: Any) -> None:
    """Trained, sampled from and checked as the model itself applies it; switched off, it is not there."""
    from peft import LoraConfig, get_peft_model

    model, _ = models.load(family_config("granite"))
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=["lm_head", "q_proj"]))
    nudge(adapted, 0.3)
    head = models.output_head(adapted)
    assert head.lora is not None and head.lora[2] == 3.0
    check_head(adapted)
    batch = pad(EXAMPLES)
    logprobs, _ = models.response_logprobs(adapted, batch)
    logits = adapted(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.predicted_at]
    exact = torch.log_softmax(logits.double(), -1).gather(-1, batch.response_tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, exact.float(), rtol=0, atol=1e-4)
    logprobs.sum().backward()
    assert all(head.lora[i].grad is not None and head.lora[i].grad.abs().max() > 0 for i in (0, 1))
    assert head.weight.grad is None
    with adapted.disable_adapter():
        assert models.output_head(adapted).lora is None
        check_head(adapted)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("phi", {"attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    ],
)
@pytest.mark.parametrize("rank", [0, 4])
def test_dropout_in_a_config_is_off_in_training(
    family_config: Callable[..., Any], name: str, changes: dict[str, float], rank: int
) -> None:
    model, _ = models.load(family_config(name, **changes))
    policy = models.trainable(model, LoRAConfig(r=rank))
    first, second = (models.response_logprobs(policy, pad(EXAMPLES))[0] for _ in range(2))
    assert first.requires_grad
    assert torch.equal(first, second)
