from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import ops
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_leaves_inputs_alone, assert_no_worse_than_torch, gradient_of
from tests.unit.ops.compare import outputs_and_gradients as run


@pytest.mark.parametrize(("case", "dtype"), [x for x in cases.logits_and_dtypes() if x[0] is not cases.no_rows])
def test_value_and_gradient_are_no_worse_than_torch(case: cases.Case, dtype: torch.dtype) -> None:
    exact, tokens = case()

    def torch_of_today(z: Tensor) -> Tensor:
        return F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), tokens)

    logits, upstream = exact.to(dtype), [torch.tensor(1.7)]
    got, gradients = run(lambda z: ops.cross_entropy(z, tokens), [logits], upstream)
    stock, stock_gradients = run(torch_of_today, [logits], upstream)
    truth, true_gradients = run(torch_of_today, [logits.double()], upstream)
    assert got[0].dtype == torch.float32
    assert gradients[0].dtype == dtype
    assert_no_worse_than_torch(got[0], stock[0], truth[0])
    assert_no_worse_than_torch(gradients[0], stock_gradients[0], true_gradients[0], "gradient")


def test_is_minus_the_mean_token_logprob() -> None:
    logits, tokens = cases.random(4, 9, 20, dtype=torch.float64), cases.random_tokens(4, 9, vocabulary=20)
    logprobs, _ = ops.token_logprobs(logits, tokens)
    assert_close(ops.cross_entropy(logits, tokens), -logprobs.mean(), 1e-12)
    mask = cases.holes()
    assert_close(ops.cross_entropy(logits, tokens, mask), -logprobs[mask].mean(), 1e-12)


@pytest.mark.parametrize("ignore_index", [-100, 0, 7])
def test_mask_and_ignore_index_leave_out_the_same_way(ignore_index: int) -> None:
    logits, tokens, mask = cases.random(4, 9, 20), cases.random_tokens(4, 9, vocabulary=20), cases.holes()
    ignored = torch.where(mask, tokens, ignore_index)
    counted = ignored != ignore_index
    want = F.cross_entropy(logits[counted], tokens[counted])
    assert_close(ops.cross_entropy(logits, ignored, ignore_index=ignore_index), want, 1e-6)
    assert_close(ops.cross_entropy(logits, tokens, counted), want, 1e-6)
    assert_close(ops.cross_entropy(logits, ignored, mask, ignore_index), want, 1e-6)


def test_gradient_checks_in_float64() -> None:
    logits = cases.random(4, 6, dtype=torch.float64).requires_grad_()
    tokens, mask = torch.tensor([1, -100, 5, 0]), torch.tensor([True, True, True, False])
    assert torch.autograd.gradcheck(lambda z: ops.cross_entropy(z, tokens, mask), [logits])


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_rows_that_do_not_count_may_hold_anything_and_get_no_gradient(garbage: float) -> None:
    logits, mask = cases.random(4, 9, 20), cases.holes()
    tokens = torch.where(mask, cases.random_tokens(4, 9, vocabulary=20), 10**6)
    tokens[0, 2] = -100
    counted = mask & (tokens != -100)
    got, (gradient,) = run(
        lambda z: ops.cross_entropy(z, tokens, mask), [cases.poison(logits, counted, garbage)], [torch.ones(())]
    )
    assert_close(got[0], F.cross_entropy(logits[counted], tokens[counted]), 1e-6)
    assert gradient.isfinite().all()
    assert torch.equal(gradient[~counted], torch.zeros_like(gradient[~counted]))


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("denominator", [None, 5.0, torch.tensor(0)])
def test_nothing_that_counts_gives_zero_with_a_graph(rows: int, denominator: Any) -> None:
    logits = torch.full((rows, 20), math.nan, requires_grad=True)
    loss = ops.cross_entropy(logits, torch.full((rows,), -100), denominator=denominator)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(gradient_of(logits), torch.zeros(rows, 20))


def test_micro_batches_with_a_common_denominator_add_up() -> None:
    logits, tokens = cases.random(4, 9, 20, dtype=torch.float64), cases.random_tokens(4, 9, vocabulary=20)
    mask = cases.holes()
    parts = [ops.cross_entropy(logits[b], tokens[b], mask[b], denominator=mask.sum()) for b in range(4)]
    assert_close(torch.stack(parts).sum(), ops.cross_entropy(logits, tokens, mask), 1e-12)


@pytest.mark.parametrize("layout", [cases.transposed, cases.unaligned])
@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64])
def test_strides_and_token_dtype_do_not_matter(layout: Callable[[Tensor], Tensor], token_dtype: torch.dtype) -> None:
    logits, tokens = cases.random(7, 123), cases.random_tokens(7, vocabulary=123)
    got = ops.cross_entropy(layout(logits), tokens.to(token_dtype))
    assert_close(got, ops.cross_entropy(logits, tokens), 2e-6)


def test_leaves_its_inputs_alone() -> None:
    tokens = torch.tensor([1, -100, 3])
    assert_leaves_inputs_alone(ops.cross_entropy, cases.random(3, 9).requires_grad_(), tokens, tokens > 0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"tokens": torch.tensor([0, -1, 0])}, ValueError, r"tokens: -1 is outside the vocabulary of 5 \(row 1\)"),
        ({"tokens": torch.tensor([0, 5, 0])}, ValueError, r"tokens: 5 is outside the vocabulary of 5 \(row 1\)"),
        ({"tokens": torch.zeros(3)}, TypeError, "tokens: float32, expected int64 or int32"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "logits: an empty vocabulary"),
        ({"logits": torch.zeros(4, 5)}, ValueError, r"tokens: shape \(3,\), expected \(4,\) like the rows of logits"),
        ({"mask": torch.ones(3)}, TypeError, "mask: float32, expected bool"),
        ({"denominator": 0.0}, ValueError, "denominator: 0.0, expected a number > 0"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.cross_entropy(**{"logits": torch.zeros(3, 5), "tokens": torch.zeros(3).long(), **change})
