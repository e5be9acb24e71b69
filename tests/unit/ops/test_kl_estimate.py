from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_fast import ops
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_leaves_inputs_alone, assert_no_worse
from tests.unit.ops.compare import outputs_and_gradients as run
from tests.unit.ops.conftest import Backend

FORMULAS = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
}
KINDS = (*FORMULAS, "k1+", "k3+")


def torch_of_today(p: Tensor, q: Tensor, kind: str) -> Tensor:
    d = (p - q) if p.dtype == torch.float64 else p.float() - q.float()
    k2 = d * d / 2
    value = {"k1": d, "k2": k2, "k3": torch.expm1(-d) + d}[kind[:2]]
    return value.detach() + k2 - k2.detach() if kind.endswith("+") else value


def test_default_is_k1(backend: Backend) -> None:
    p, q = cases.random(5), cases.random(5, seed=1)
    assert torch.equal(backend(ops.kl_estimate, p, q), p - q)


@pytest.mark.parametrize("kind", FORMULAS)
def test_is_the_formula(kind: str) -> None:
    p, q = cases.random(3, 4, dtype=torch.float64), cases.random(3, 4, seed=1, dtype=torch.float64)
    want = np.vectorize(FORMULAS[kind])(p.numpy() - q.numpy())
    np.testing.assert_allclose(ops.kl_estimate(p, q, kind).numpy(), want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 8, 37, 3000])
def test_values_and_gradients_are_no_worse_than_torch(
    backend: Backend, count: int, kind: str, scale: float, dtype: torch.dtype
) -> None:
    p, q = cases.random(count, scale=scale, dtype=dtype), cases.random(count, seed=1, scale=scale, dtype=dtype)
    assert_no_worse(
        lambda p, q: backend(ops.kl_estimate, p, q, kind),
        lambda p, q: torch_of_today(p, q, kind),
        [p, q],
        [[cases.random(count, seed=2)]],
        ["estimate"],
    )


def test_k3_of_nearly_equal_policies_keeps_its_digits(backend: Backend) -> None:
    """exp(-d) - 1 + d in float32 would be all rounding error at d = 1e-3, and negative at times."""
    p = torch.full((1000,), -1.0) + torch.linspace(1e-4, 1e-3, 1000)
    q = torch.full((1000,), -1.0)
    d = p.double() - q.double()
    got = backend(ops.kl_estimate, p, q, "k3")
    assert (got >= 0).all()
    assert_close(got, (torch.expm1(-d) + d), 1e-10)


def test_far_apart_is_infinite_and_not_nan(backend: Backend) -> None:
    p, q = torch.tensor([-200.0, -1.0, -300.0]), torch.tensor([-1.0, -200.0, -300.0])
    assert backend(ops.kl_estimate, p, q, "k3").tolist() == [math.inf, 198.0, 0.0]
    nan = torch.full((20,), math.nan)
    for kind in KINDS:
        assert backend(ops.kl_estimate, nan, torch.zeros(20), kind).isnan().all()


@pytest.mark.parametrize("kind", FORMULAS)
def test_gradient_checks_in_float64(kind: str) -> None:
    p, q = (cases.random(6, seed=i, dtype=torch.float64).requires_grad_() for i in (0, 1))
    mask = torch.tensor([True, False, True, True, True, False])
    assert torch.autograd.gradcheck(lambda p, q: ops.kl_estimate(p, q, kind, mask), [p, q])


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

    expected = {kind: (p * ops.kl_estimate(logp, q, kind)).sum() for kind in KINDS}
    gradients = {kind: torch.autograd.grad(x, logits, retain_graph=True)[0] for kind, x in expected.items()}
    for kind in ("k1", "k3", "k1+", "k3+"):
        assert_close(expected[kind], forward, 1e-12)
    for kind in ("k2", "k1+", "k3+"):
        assert_close(gradients[kind], forward_gradient, 1e-12)
    assert_close(gradients["k1"], torch.zeros(6), 1e-12)
    assert_close(gradients["k3"], reverse_gradient, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_may_hold_anything_and_give_zeros(backend: Backend, kind: str) -> None:
    mask = cases.holes()
    p, q, upstream = cases.random(4, 9), cases.random(4, 9, seed=1), [cases.random(4, 9, seed=2)]
    got, gradients = run(
        lambda p, q: backend(ops.kl_estimate, p, q, kind, mask),
        [cases.poison(p, mask), cases.poison(q, mask, math.inf)],
        upstream,
    )
    want, want_gradients = run(lambda p, q: backend(ops.kl_estimate, p, q, kind), [p, q], upstream)
    for mine, whole in zip([*got, *gradients], [*want, *want_gradients], strict=True):
        assert torch.equal(mine, torch.where(mask, whole, 0))


def test_layout_changes_no_bit(kernel_backend: Backend) -> None:
    p, q = cases.random(6, 50), cases.random(6, 50, seed=1)
    want = kernel_backend(ops.kl_estimate, p, q, "k3")
    for layout in (cases.transposed, cases.unaligned):
        assert torch.equal(kernel_backend(ops.kl_estimate, layout(p), layout(q), "k3"), want)


def test_dtypes_may_differ(backend: Backend) -> None:
    p, q = cases.random(40), cases.random(40, seed=1, dtype=torch.bfloat16)
    (got,), gradients = run(lambda p, q: backend(ops.kl_estimate, p, q, "k2"), [p, q], [cases.random(40, seed=2)])
    assert_close(got, (p.double() - q.double()).square() / 2, 1e-6)
    assert [g.dtype for g in gradients] == [torch.float32, torch.bfloat16]


def test_only_what_needs_a_gradient_gets_one(backend: Backend) -> None:
    p, q = cases.random(5).requires_grad_(), cases.random(5, seed=1)
    backend(ops.kl_estimate, p, q, "k2").sum().backward()
    assert p.grad is not None and q.grad is None
    assert_close(p.grad, (p - q).detach(), 1e-6)


@pytest.mark.seconds(2)
def test_same_call_same_bits(backend: Backend) -> None:
    p, q = cases.random(3000), cases.random(3000, seed=1)
    first = backend(ops.kl_estimate, p, q, "k3")
    for _ in range(3 if backend.slow else 100):
        assert torch.equal(backend(ops.kl_estimate, p, q, "k3"), first)


def test_compiles_and_is_registered_as_torch_wants_it() -> None:
    p, q, mask = cases.random(5), cases.random(5, seed=1), torch.tensor([True, False, True, True, True])
    compiled = torch.compile(ops.kl_estimate, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        got = run(lambda p, q: compiled(p, q, "k3+"), [p[:n], q[:n]], [torch.ones(n)])
        want = run(lambda p, q: ops.kl_estimate(p, q, "k3+"), [p[:n], q[:n]], [torch.ones(n)])
        assert torch.equal(got[0][0], want[0][0]) and torch.equal(got[1][0], want[1][0])
    forward, backward = torch.ops.rlhf_fast.kl_estimate_forward, torch.ops.rlhf_fast.kl_estimate_backward
    torch.library.opcheck(forward.default, (p.clone().requires_grad_(), q, mask, "k3", "cpu"))
    torch.library.opcheck(backward.default, (torch.ones(5), p, q, None, "k3", [True, False], "cpu"))


def test_leaves_its_inputs_alone(backend: Backend) -> None:
    assert_leaves_inputs_alone(
        lambda *x: backend(ops.kl_estimate, *x), cases.random(5).requires_grad_(), cases.random(5), "k3"
    )


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.zeros(3), torch.zeros(3), "k4"), ValueError, "kind: 'k4', did you mean 'k"),
        ((torch.zeros(3), torch.zeros(4)), ValueError, r"ref_logprobs: shape \(4,\), expected \(3,\) like logprobs"),
        ((torch.zeros(3).long(), torch.zeros(3)), TypeError, "logprobs: int64, expected float32"),
        ((torch.zeros(3), torch.zeros(3), "k1", torch.ones(2) > 0), ValueError, r"mask: shape \(2,\), expected \(3,\)"),
        ((torch.zeros(3), torch.zeros(3, device="meta")), ValueError, "ref_logprobs: on meta, expected cpu"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.kl_estimate(*arguments)
