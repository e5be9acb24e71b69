from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_leaves_inputs_alone, gradient_of


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Three pairs of responses to nine tokens, with masks."""
    return {
        "hidden": cases.random(6, 9, 8, dtype=dtype),
        "weight": cases.random(30, 8, scale=0.5, dtype=dtype),
        "tokens": cases.random_tokens(6, 9, vocabulary=30),
        "ref_chosen": cases.random(3, seed=2, dtype=dtype) - 20,
        "ref_rejected": cases.random(3, seed=3, dtype=dtype) - 20,
        "mask": cases.random(6, 9, seed=4) > -0.3,
    }


def with_logits(hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor, average: bool, **rest: Any) -> Tensor:
    logp = torch.log_softmax(hidden @ weight.T, -1).gather(-1, tokens[..., None])[..., 0] * mask
    sums = logp.sum(1) / (mask.sum(1) if average else 1)
    return ops.dpo_loss(sums[:3], sums[3:], **rest)[0]


@pytest.mark.parametrize("options", [{}, {"loss": "ipo", "average": True}, {"loss": "kto", "kl": 0.3, "beta": 0.5}])
def test_is_dpo_loss_of_the_sums(options: dict[str, Any]) -> None:
    inputs = batch()
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
    got, stats = ops.linear_dpo_loss(**inputs, **options)
    want = with_logits(**inputs, **{"average": False, **options})
    assert_close(got, want, 1e-12)
    assert set(stats) == {"accuracy", "margin", "chosen_reward", "rejected_reward"}
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert_close(a, b, 1e-12)


def test_packed_equals_padded_and_masked_tokens_may_hold_anything() -> None:
    inputs, lengths = batch(torch.float32), [9, 4, 1, 7, 9, 2]
    inputs["mask"] &= cases.inside(lengths, 9)
    weight = inputs["weight"].requires_grad_()
    padded, _ = ops.linear_dpo_loss(**inputs)
    (want,) = torch.autograd.grad(padded, weight)
    flat = {**inputs, "cu_seqlens": cases.cu_seqlens_of(lengths)}
    for name in ("hidden", "tokens", "mask"):
        flat[name] = cases.pack(inputs[name], lengths)
    flat["hidden"] = cases.poison(flat["hidden"], flat["mask"], math.nan)
    packed, _ = ops.linear_dpo_loss(**flat)
    assert_close(packed, padded, 1e-5)
    assert_close(torch.autograd.grad(packed, weight)[0], want, 1e-5)


def test_identical_responses_lose_ln_2_and_teach_nothing() -> None:
    inputs = batch()
    for name in ("hidden", "tokens", "mask"):
        inputs[name] = inputs[name][:3].repeat(2, *[1] * (inputs[name].dim() - 1))
    inputs["ref_rejected"], weight = inputs["ref_chosen"], inputs["weight"].requires_grad_()
    loss, _ = ops.linear_dpo_loss(**inputs)
    loss.backward()
    assert_close(loss, torch.tensor(math.log(2)), 1e-7)
    assert_close(gradient_of(weight), torch.zeros(30, 8), 1e-15)


def test_no_pairs_give_zero() -> None:
    inputs = {k: v[:0] if k != "weight" else v for k, v in batch(torch.float32).items()}
    assert ops.linear_dpo_loss(**inputs)[0].item() == 0


def test_leaves_its_inputs_alone() -> None:
    assert_leaves_inputs_alone(ops.linear_dpo_loss, **batch())


def test_a_wrong_number_of_sequences_is_named() -> None:
    inputs = batch()
    inputs["ref_chosen"] = inputs["ref_rejected"] = torch.zeros(4)
    with pytest.raises(ValueError, match="tokens: 6 sequences, expected 8: the chosen ones of 4 pairs, then"):
        ops.linear_dpo_loss(**inputs)
