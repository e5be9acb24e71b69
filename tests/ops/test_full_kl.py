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


def torch_of_today(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """torch's own kl_div, whose target is p; the other way round than its name suggests."""
    return F.kl_div(F.log_softmax(ref_logits, -1), F.log_softmax(logits, -1), reduction="none", log_target=True).sum(-1)


def test_is_the_definition_in_float64() -> None:
    p, q = cases.random(4, 30, scale=2, dtype=torch.float64), cases.random(4, 30, seed=1, dtype=torch.float64)
    want = []
    for a, b in zip(p.tolist(), q.tolist(), strict=True):
        sum_a, sum_b = sum(map(math.exp, a)), sum(map(math.exp, b))
        terms = zip(a, b, strict=True)
        want.append(sum(math.exp(x) / sum_a * (x - math.log(sum_a) - y + math.log(sum_b)) for x, y in terms))
    assert_close(ops.full_kl(p, q), torch.tensor(want, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("case", cases.LOGITS)
def test_values_and_gradients_are_no_worse_than_torch(case: cases.Case) -> None:
    p = case()[0].float()
    q = torch.where(p.isinf(), p, cases.random(*p.shape, seed=5))  # the same words banned in both
    upstream = [cases.random(p.shape[0], seed=1)]
    got, gradients = run(ops.full_kl, [p, q], upstream)
    # kl_div makes nan of words banned in both, so the truth and torch are asked about the rest of the vocabulary
    allowed = ~p.isinf().any(0)
    stock, stock_gradients = run(torch_of_today, [p[:, allowed], q[:, allowed]], upstream)
    truth, true_gradients = run(torch_of_today, [p[:, allowed].double(), q[:, allowed].double()], upstream)
    assert_no_worse_than_torch(got[0], stock[0], truth[0])
    for mine, stock_one, true in zip(gradients, stock_gradients, true_gradients, strict=True):
        assert_no_worse_than_torch(mine[:, allowed], stock_one, true, "gradient")
        assert torch.equal(mine[:, ~allowed], torch.zeros_like(mine[:, ~allowed]))


def test_a_word_that_only_the_policy_excludes_costs_nothing() -> None:
    p = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64).requires_grad_()
    q = torch.tensor([[0.0, 0.0, 0.0]], dtype=torch.float64).requires_grad_()
    kl = ops.full_kl(p, q)
    assert_close(kl, torch.tensor([math.log(3 / 2)], dtype=torch.float64), 1e-12)
    kl.sum().backward()
    assert gradient_of(p).isfinite().all() and gradient_of(q).isfinite().all()


def test_a_word_that_only_the_reference_excludes_costs_infinity() -> None:
    kl = ops.full_kl(torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -math.inf]]))
    assert kl.item() == math.inf


def test_equal_distributions_have_no_divergence_and_no_gradient() -> None:
    p = cases.random(3, 50).requires_grad_()
    kl = ops.full_kl(p, p.detach() + 2.5)
    kl.sum().backward()
    assert_close(kl, torch.zeros(3), 1e-6)
    assert_close(gradient_of(p), torch.zeros(3, 50), 1e-6)


def test_gradient_checks_in_float64() -> None:
    p, q = (cases.random(3, 5, seed=i, dtype=torch.float64).requires_grad_() for i in (0, 1))
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda p, q: ops.full_kl(p, q, mask), [p, q])


def test_masked_rows_may_hold_anything_and_give_zeros() -> None:
    mask = cases.holes()
    p, q = cases.random(4, 9, 11), cases.random(4, 9, 11, seed=1)
    upstream = [cases.random(4, 9, seed=2)]
    got, gradients = run(
        lambda p, q: ops.full_kl(p, q, mask), [cases.poison(p, mask), cases.poison(q, mask, math.inf)], upstream
    )
    want, want_gradients = run(ops.full_kl, [p, q], upstream)
    assert torch.equal(got[0], torch.where(mask, want[0], 0))
    for mine, whole in zip(gradients, want_gradients, strict=True):
        assert torch.equal(mine, torch.where(mask[..., None], whole, 0))


def test_leaves_its_inputs_alone() -> None:
    assert_leaves_inputs_alone(ops.full_kl, cases.random(3, 5).requires_grad_(), cases.random(3, 5).requires_grad_())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.zeros(3, 5), torch.zeros(3, 4)), ValueError, r"ref_logits: shape \(3, 4\), expected \(3, 5\)"),
        ((torch.zeros(3, 0), torch.zeros(3, 0)), ValueError, r"logits: shape \(3, 0\), expected \(\.\.\., V\) with V"),
        ((torch.zeros(3, 5), torch.zeros(3, 5), torch.ones(5) > 0), ValueError, r"mask: shape \(5,\), expected \(3,\)"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.full_kl(*arguments)
