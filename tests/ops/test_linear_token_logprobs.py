from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import ops
from tests.ops import cases
from tests.ops.compare import assert_close, assert_leaves_inputs_alone, assert_no_worse_than_torch, gradient_of
from tests.ops.compare import outputs_and_gradients as run


def torch_of_today(tokens: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    logp = F.log_softmax(F.linear(hidden, weight, bias), dim=-1)
    return logp.gather(-1, tokens[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def test_values_and_gradients_are_no_worse_than_torch() -> None:
    hidden, weight, bias = cases.random(9, 16), cases.random(300, 16), cases.random(300)
    tokens = cases.random_tokens(9, vocabulary=300)
    upstream = (cases.random(9, seed=1), cases.random(9, seed=2))
    exact = [x.double() for x in (hidden, weight, bias)]
    for used in (upstream, (upstream[0], None), (None, upstream[1])):
        got, gradients = run(
            lambda h, w, b: ops.linear_token_logprobs(h, w, tokens, b), [hidden, weight, bias], used
        )  # fmt: skip
        stock, stock_gradients = run(lambda *x: torch_of_today(tokens, *x), [hidden, weight, bias], used)
        truth, true_gradients = run(lambda *x: torch_of_today(tokens, *x), exact, used)
        for a, b, c in zip(got + gradients, stock + stock_gradients, truth + true_gradients, strict=True):
            assert_no_worse_than_torch(a, b, c)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    hidden, weight = cases.random(5, 32, dtype=dtype), cases.random(200, 32, dtype=dtype)
    tokens = cases.random_tokens(5, vocabulary=200)
    upstream = (cases.random(5, seed=1), cases.random(5, seed=2))
    got, gradients = run(lambda h, w: ops.linear_token_logprobs(h, w, tokens), [hidden, weight], upstream)
    truth, _ = run(lambda h, w: torch_of_today(tokens, h, w), [hidden.double(), weight.double()], upstream)
    wide, _ = run(lambda h, w: torch_of_today(tokens, h, w), [hidden.float(), weight.float()], upstream)
    for a, b, c in zip(got, wide, truth, strict=True):
        assert a.dtype == torch.float32
        assert_no_worse_than_torch(a, b, c)
    assert [g.dtype for g in gradients] == [dtype, dtype]


def test_autocast_changes_nothing() -> None:
    hidden, weight = cases.random(5, 32), cases.random(200, 32)
    tokens = cases.random_tokens(5, vocabulary=200)
    want = ops.linear_token_logprobs(hidden, weight, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.linear_token_logprobs(hidden, weight, tokens)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_is_token_logprobs_of_the_product() -> None:
    hidden, weight, bias = (x.double() for x in (cases.random(4, 6, 8), cases.random(30, 8), cases.random(30)))
    tokens, mask = cases.random_tokens(4, 6, vocabulary=30), cases.holes()[:, :6]
    options: dict[str, Any] = {
        "temperature": torch.tensor([[0.5], [1.0], [2.0], [3.0]]),
        "softcap": 4.0,
        "logit_scale": 0.5,
    }
    got = ops.linear_token_logprobs(hidden, weight, tokens, bias, mask=mask, **options)
    want = ops.token_logprobs(hidden @ weight.T + bias, tokens, mask=mask, **options)
    assert_close(got[0], want[0], 1e-12)
    assert_close(got[1], want[1], 1e-12)


def test_gradient_checks_in_float64() -> None:
    inputs = [cases.random(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 4), (6, 4), (6,))]
    tokens, mask = torch.tensor([0, 5, 2]), torch.tensor([True, False, True])

    def op(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return ops.linear_token_logprobs(h, w, tokens, b, temperature=0.8, softcap=3.0, mask=mask)

    assert torch.autograd.gradcheck(op, inputs)


def test_masked_rows_may_hold_anything_and_add_nothing_to_the_weight() -> None:
    mask = cases.holes()
    hidden, weight = cases.random(4, 9, 8), cases.random(30, 8)
    tokens = cases.random_tokens(4, 9, vocabulary=30)
    upstream = (cases.random(4, 9, seed=1), cases.random(4, 9, seed=2))
    outputs, (dh, dw) = run(
        lambda h, w: ops.linear_token_logprobs(h, w, torch.where(mask, tokens, 10**6), mask=mask),
        [cases.poison(hidden, mask, math.nan), weight],
        upstream,
    )
    kept, (dh_kept, dw_kept) = run(
        lambda h, w: ops.linear_token_logprobs(h, w, tokens[mask]), [hidden[mask], weight], [u[mask] for u in upstream]
    )
    for got, want in zip(outputs, kept, strict=True):
        assert torch.equal(got[~mask], torch.zeros_like(got[~mask]))
        assert_close(got[mask], want, 1e-5)
    assert torch.equal(dh[~mask], torch.zeros_like(dh[~mask]))
    assert_close(dh[mask], dh_kept, 1e-5)
    assert_close(dw, dw_kept, 1e-5)


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight = cases.random(3, 8).requires_grad_(), cases.random(30, 8)
    ops.linear_token_logprobs(hidden, weight, torch.tensor([1, 2, 3]))[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_no_rows_give_no_outputs_and_a_zero_weight_gradient() -> None:
    weight = cases.random(30, 8).requires_grad_()
    logprobs, entropy = ops.linear_token_logprobs(torch.empty(0, 8), weight, torch.empty(0, dtype=torch.int64))
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(gradient_of(weight), torch.zeros_like(weight))


def test_leaves_its_inputs_alone() -> None:
    hidden, weight = cases.random(3, 8).requires_grad_(), cases.random(30, 8).requires_grad_()
    mask = torch.tensor([True, False, True])
    assert_leaves_inputs_alone(
        ops.linear_token_logprobs, hidden, weight, torch.tensor([1, 2, 3]), torch.zeros(30), mask=mask
    )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"hidden": torch.zeros(3, 7)}, ValueError, r"hidden: shape \(3, 7\), expected \(\.\.\., 8\) to match weight"),
        ({"weight": torch.zeros(30)}, ValueError, r"weight: shape \(30,\), expected \(V, H\)"),
        ({"weight": torch.zeros(30, 8).long()}, TypeError, "weight: int64, expected float32"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias: shape \(8,\), expected \(30,\) like the rows of weight"),
        ({"tokens": torch.tensor([0, 30, 0])}, ValueError, r"tokens: 30 is outside the vocabulary of 30 \(row 1\)"),
        ({"weight": torch.zeros(30, 8, device="meta")}, ValueError, "weight: on meta, expected cpu like hidden"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"hidden": torch.zeros(3, 8), "weight": torch.zeros(30, 8), "tokens": torch.zeros(3).long(), **change}
    with pytest.raises(error, match=text):
        ops.linear_token_logprobs(**arguments)
