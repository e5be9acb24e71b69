from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import ops
from tests.ops import cases
from tests.ops.compare import assert_close, assert_leaves_inputs_alone, assert_no_worse_than_torch
from tests.ops.compare import outputs_and_gradients as run


@pytest.mark.parametrize("vocabulary", [1, 123, 1000])
def test_value_and_gradients_are_no_worse_than_torch(vocabulary: int) -> None:
    inputs = [cases.random(9, 16), cases.random(vocabulary, 16), cases.random(vocabulary)]
    tokens, upstream = cases.random_tokens(9, vocabulary=vocabulary), [torch.tensor(1.7)]

    def torch_of_today(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w, b), tokens)

    got, gradients = run(lambda h, w, b: ops.linear_cross_entropy(h, w, tokens, b), inputs, upstream)
    stock, stock_gradients = run(torch_of_today, inputs, upstream)
    truth, true_gradients = run(torch_of_today, [x.double() for x in inputs], upstream)
    for a, b, c in zip(got + gradients, stock + stock_gradients, truth + true_gradients, strict=True):
        assert_no_worse_than_torch(a, b, c)


def test_is_minus_the_mean_linear_token_logprob() -> None:
    hidden, weight, bias = (x.double() for x in (cases.random(4, 9, 8), cases.random(30, 8), cases.random(30)))
    tokens, mask = cases.random_tokens(4, 9, vocabulary=30), cases.holes()
    logprobs, _ = ops.linear_token_logprobs(hidden, weight, tokens, bias, softcap=3.0, logit_scale=0.5)
    got = ops.linear_cross_entropy(hidden, weight, tokens, bias, softcap=3.0, logit_scale=0.5, mask=mask)
    assert_close(got, -logprobs[mask].mean(), 1e-12)


def test_gradient_checks_in_float64() -> None:
    inputs = [cases.random(*shape, dtype=torch.float64).requires_grad_() for shape in ((4, 3), (6, 3), (6,))]
    tokens, mask = torch.tensor([1, -100, 5, 0]), torch.tensor([True, True, True, False])
    assert torch.autograd.gradcheck(
        lambda h, w, b: ops.linear_cross_entropy(h, w, tokens, b, softcap=3.0, logit_scale=0.7, mask=mask), inputs
    )


def test_rows_that_do_not_count_may_hold_anything_and_add_nothing() -> None:
    hidden, weight, mask = cases.random(4, 9, 8), cases.random(30, 8), cases.holes()
    tokens = torch.where(mask, cases.random_tokens(4, 9, vocabulary=30), 10**6)
    tokens[0, 2] = -100
    counted = mask & (tokens != -100)
    got, (dh, dw) = run(
        lambda h, w: ops.linear_cross_entropy(h, w, tokens, mask=mask),
        [cases.poison(hidden, counted, math.nan), weight],
        [torch.ones(())],
    )
    want, (dh_kept, dw_kept) = run(
        lambda h, w: F.cross_entropy(h @ w.T, tokens[counted]), [hidden[counted], weight], [torch.ones(())]
    )
    assert_close(got[0], want[0], 1e-5)
    assert_close(dw, dw_kept, 1e-5)
    assert_close(dh[counted], dh_kept, 1e-5)
    assert torch.equal(dh[~counted], torch.zeros_like(dh[~counted]))


def test_autocast_changes_nothing() -> None:
    hidden, weight, tokens = cases.random(5, 32), cases.random(200, 32), cases.random_tokens(5, vocabulary=200)
    want = ops.linear_cross_entropy(hidden, weight, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.linear_cross_entropy(hidden, weight, tokens), want)


def test_nothing_that_counts_gives_zero_with_a_graph() -> None:
    weight = cases.random(30, 8).requires_grad_()
    for rows in (0, 3):
        loss = ops.linear_cross_entropy(torch.full((rows, 8), math.nan), weight, torch.full((rows,), -100))
        (gradient,) = torch.autograd.grad(loss, weight)
        assert loss.item() == 0
        assert torch.equal(gradient, torch.zeros_like(weight))


def test_micro_batches_with_a_common_denominator_add_up() -> None:
    hidden, weight = cases.random(4, 9, 8, dtype=torch.float64), cases.random(30, 8, dtype=torch.float64)
    tokens, mask = cases.random_tokens(4, 9, vocabulary=30), cases.holes()
    parts = [
        ops.linear_cross_entropy(hidden[b], weight, tokens[b], mask=mask[b], denominator=mask.sum()) for b in range(4)
    ]
    assert_close(torch.stack(parts).sum(), ops.linear_cross_entropy(hidden, weight, tokens, mask=mask), 1e-12)


def test_leaves_its_inputs_alone() -> None:
    hidden, weight = cases.random(3, 8).requires_grad_(), cases.random(30, 8).requires_grad_()
    assert_leaves_inputs_alone(ops.linear_cross_entropy, hidden, weight, torch.tensor([1, -100, 3]))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"hidden": torch.zeros(3, 7)}, ValueError, r"hidden: shape \(3, 7\), expected \(\.\.\., 8\) to match weight"),
        ({"tokens": torch.tensor([0, 30, 0])}, ValueError, r"tokens: 30 is outside the vocabulary of 30 \(row 1\)"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias: shape \(8,\), expected \(30,\) like the rows of weight"),
        ({"softcap": -1.0}, ValueError, "softcap: -1.0, expected a number > 0"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"hidden": torch.zeros(3, 8), "weight": torch.zeros(30, 8), "tokens": torch.zeros(3).long(), **change}
    with pytest.raises(error, match=text):
        ops.linear_cross_entropy(**arguments)
