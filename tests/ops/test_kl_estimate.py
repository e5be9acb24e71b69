from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_fast import ops
from tests.ops import cases
from tests.ops.compare import assert_close, assert_leaves_inputs_alone

FORMULAS = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
}


def test_default_is_k1() -> None:
    p, q = cases.random(5), cases.random(5, seed=1)
    assert torch.equal(ops.kl_estimate(p, q), p - q)


@pytest.mark.parametrize("kind", FORMULAS)
def test_is_the_formula(kind: str) -> None:
    p, q = cases.random(3, 4, dtype=torch.float64), cases.random(3, 4, seed=1, dtype=torch.float64)
    want = np.vectorize(FORMULAS[kind])(p.numpy() - q.numpy())
    np.testing.assert_allclose(ops.kl_estimate(p, q, kind).numpy(), want, rtol=1e-12, atol=1e-15)


def test_k3_of_nearly_equal_policies_keeps_its_digits() -> None:
    """exp(-d) - 1 + d in float32 would be all rounding error at d = 1e-3, and negative at times."""
    p = torch.full((1000,), -1.0) + torch.linspace(1e-4, 1e-3, 1000)
    q = torch.full((1000,), -1.0)
    d = p.double() - q.double()
    got = ops.kl_estimate(p, q, "k3")
    assert (got >= 0).all()
    assert_close(got, (torch.expm1(-d) + d), 1e-10)


@pytest.mark.parametrize("kind", FORMULAS)
def test_gradient_checks_in_float64(kind: str) -> None:
    p, q = (cases.random(6, seed=i, dtype=torch.float64).requires_grad_() for i in (0, 1))
    assert torch.autograd.gradcheck(lambda p, q: ops.kl_estimate(p, q, kind), [p, q])


def test_expectations_and_gradients_are_what_the_docstring_says() -> None:
    """Exactly, by summing over a small vocabulary instead of sampling."""
    logits = cases.random(6, dtype=torch.float64).requires_grad_()
    q = cases.random(6, seed=1, dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    p = logp.exp().detach()
    forward = (logp.exp() * (logp - q)).sum()
    reverse = (q.exp() * (q - logp)).sum()
    (forward_gradient,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (reverse_gradient,) = torch.autograd.grad(reverse, logits, retain_graph=True)

    expected = {kind: (p * ops.kl_estimate(logp, q, kind)).sum() for kind in FORMULAS}
    gradients = {kind: torch.autograd.grad(x, logits, retain_graph=True)[0] for kind, x in expected.items()}
    assert_close(expected["k1"], forward, 1e-12)
    assert_close(expected["k3"], forward, 1e-12)
    assert_close(gradients["k1"], torch.zeros(6), 1e-12)
    assert_close(gradients["k2"], forward_gradient, 1e-12)
    assert_close(gradients["k3"], reverse_gradient, 1e-12)


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_result_is_float32_for_narrow_inputs(dtype: torch.dtype) -> None:
    p, q = cases.random(8, dtype=dtype), cases.random(8, seed=1, dtype=dtype)
    got = ops.kl_estimate(p, q, "k2")
    assert got.dtype == torch.float32
    assert_close(got, (p.double() - q.double()).square() / 2, 1e-6)


def test_leaves_its_inputs_alone() -> None:
    assert_leaves_inputs_alone(ops.kl_estimate, cases.random(5).requires_grad_(), cases.random(5), "k3")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.zeros(3), torch.zeros(3), "k4"), ValueError, "kind: 'k4', did you mean 'k"),
        ((torch.zeros(3), torch.zeros(4)), ValueError, r"ref_logprobs: shape \(4,\), expected \(3,\) like logprobs"),
        ((torch.zeros(3).long(), torch.zeros(3)), TypeError, "logprobs: int64, expected float32"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.kl_estimate(*arguments)
