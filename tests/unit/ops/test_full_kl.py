from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import reference
from tests.unit.ops import cases
from tests.unit.ops.compare import (
    assert_close,
    assert_leaves_inputs_alone,
    assert_no_worse,
    assert_no_worse_than_torch,
    gradient_of,
)
from tests.unit.ops.compare import outputs_and_gradients as run
from tests.unit.ops.conftest import Backend

KINDS = ("kl", "reverse_kl", "js")


def torch_of_today(logits: Tensor, ref_logits: Tensor, kind: str = "kl", **transform: Any) -> Tensor:
    """torch's own kl_div, whose target is p; the other way round than its name suggests."""
    logits, ref_logits = (x if x.dtype == torch.float64 else x.float() for x in (logits, ref_logits))
    logp, logq = (F.log_softmax(cases.transform(x, **transform), -1) for x in (logits, ref_logits))

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if kind == "js":  # log p - log m = log 2 - log(1 + q / p)
        p_terms = logp.exp() * (math.log(2) - F.softplus(logq - logp))
        return (p_terms + logq.exp() * (math.log(2) - F.softplus(logp - logq))).sum(-1) / 2
    return kl(logp, logq) if kind == "kl" else kl(logq, logp)


def policies(case: cases.Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The case's logits and others with the same words banned."""
    p = case()[0].to(dtype)
    return p, torch.where(p.isinf(), p, cases.random(*p.shape, seed=5, scale=2, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_definition_in_float64(kind: str) -> None:
    p, q = cases.random(4, 30, scale=2, dtype=torch.float64), cases.random(4, 30, seed=1, dtype=torch.float64)
    want = []
    for a, b in zip(p.tolist(), q.tolist(), strict=True):
        sum_a, sum_b = sum(map(math.exp, a)), sum(map(math.exp, b))
        pairs = [(math.exp(x) / sum_a, math.exp(y) / sum_b) for x, y in zip(a, b, strict=True)]
        kl = sum(x * math.log(x / y) for x, y in pairs)
        reverse = sum(y * math.log(y / x) for x, y in pairs)
        js = sum(0.5 * x * math.log(2 * x / (x + y)) + 0.5 * y * math.log(2 * y / (x + y)) for x, y in pairs)
        want.append({"kl": kl, "reverse_kl": reverse, "js": js}[kind])
    assert_close(ops.full_kl(p, q, kind=kind), torch.tensor(want, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize(("case", "dtype", "kind"), cases.logits_and_dtypes(*KINDS), ids=cases.case_id)
@pytest.mark.seconds(2)
def test_values_and_gradients_are_no_worse_than_torch(
    backend: Backend, case: cases.Case, dtype: torch.dtype, kind: str
) -> None:
    p, q = policies(case, dtype)
    upstream = [cases.random(p.shape[0], seed=1)]
    got, gradients = run(lambda p, q: backend(ops.full_kl, p, q, kind=kind), [p, q], upstream)
    # kl_div makes nan of words banned in both, so the truth and torch are asked about the rest of the vocabulary
    allowed = ~p.isinf().any(0)
    if backend.name == "reference" and kind == "js" and not allowed.all():
        pytest.skip("is what the others are held against, only over more words: one rounding compared with another")
    rest = [p[:, allowed], q[:, allowed]]
    stock, stock_gradients = run(lambda p, q: torch_of_today(p, q, kind), rest, upstream)
    truth, true_gradients = run(lambda p, q: torch_of_today(p, q, kind), [x.double() for x in rest], upstream)
    assert got[0].dtype == torch.float32
    assert_no_worse_than_torch(got[0], stock[0], truth[0])
    for mine, stock_one, true in zip(gradients, stock_gradients, true_gradients, strict=True):
        assert mine.dtype == dtype
        assert_no_worse_than_torch(mine[:, allowed], stock_one, true, "gradient")
        assert torch.equal(mine[:, ~allowed], torch.zeros_like(mine[:, ~allowed]))


@pytest.mark.parametrize("options", cases.TRANSFORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_are_no_worse_than_torch(backend: Backend, kind: str, options: dict[str, float]) -> None:
    assert_no_worse(
        lambda p, q: backend(ops.full_kl, p, q, kind=kind, **options),
        lambda p, q: torch_of_today(p, q, kind, **options),
        policies(cases.plain),
        [[cases.random(7, seed=1)]],
        ["divergence"],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_may_differ_per_row(backend: Backend, kind: str) -> None:
    temperature = cases.random(7).abs() + 0.3
    assert_no_worse(
        lambda p, q: backend(ops.full_kl, p, q, kind=kind, temperature=temperature),
        lambda p, q: torch_of_today(p, q, kind, temperature=temperature),
        policies(cases.plain),
        [[cases.random(7, seed=1)]],
        ["divergence"],
    )


def test_a_word_that_only_the_policy_excludes_costs_nothing(backend: Backend) -> None:
    p = torch.tensor([[0.0, 0.0, -math.inf]]).requires_grad_()
    q = torch.tensor([[0.0, 0.0, 0.0]]).requires_grad_()
    kl = backend(ops.full_kl, p, q)
    assert_close(kl, torch.tensor([math.log(3 / 2)]), 1e-6)
    kl.sum().backward()
    assert_close(gradient_of(p), torch.zeros(1, 3), 1e-6)
    assert_close(gradient_of(q), torch.tensor([[1 / 3 - 1 / 2, 1 / 3 - 1 / 2, 1 / 3]]), 1e-6)


def test_a_word_that_only_the_reference_excludes_costs_infinity_and_js_at_most_ln_2(backend: Backend) -> None:
    p, q = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -math.inf]])
    assert backend(ops.full_kl, p, q).item() == math.inf
    assert backend(ops.full_kl, q, p, kind="reverse_kl").item() == math.inf
    p, q = torch.zeros(1, 9000), torch.zeros(1, 9000)
    p[:, 4500:], q[:, :4500] = -math.inf, -math.inf
    (js,), gradients = run(lambda p, q: backend(ops.full_kl, p, q, kind="js"), [p, q], [torch.ones(1)])
    assert_close(js, torch.tensor([math.log(2)]), 1e-6)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_have_no_divergence_and_no_gradient(backend: Backend, kind: str) -> None:
    p = cases.random(3, 50).requires_grad_()
    kl = backend(ops.full_kl, p, p.detach() + 2.5, kind=kind)
    kl.sum().backward()
    assert_close(kl, torch.zeros(3), 1e-6)
    assert_close(gradient_of(p), torch.zeros(3, 50), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checks_in_float64(kind: str) -> None:
    p, q = (cases.random(3, 5, seed=i, dtype=torch.float64).requires_grad_() for i in (0, 1))
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda p, q: ops.full_kl(p, q, mask, kind, 0.7, 3.0, 0.5), [p, q])


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_may_hold_anything_and_give_zeros(backend: Backend, kind: str) -> None:
    mask = cases.holes()
    p, q = cases.random(4, 9, 11), cases.random(4, 9, 11, seed=1)
    upstream = [cases.random(4, 9, seed=2)]
    got, gradients = run(
        lambda p, q: backend(ops.full_kl, p, q, mask, kind),
        [cases.poison(p, mask), cases.poison(q, mask, math.inf)],
        upstream,
    )
    want, want_gradients = run(lambda p, q: backend(ops.full_kl, p, q, None, kind), [p, q], upstream)
    assert torch.equal(got[0], torch.where(mask, want[0], 0))
    for mine, whole in zip(gradients, want_gradients, strict=True):
        assert torch.equal(mine, torch.where(mask[..., None], whole, 0))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_distribution_gives_nan_and_spoils_no_other_row(backend: Backend, kind: str, broken: float) -> None:
    p, q = cases.random(4, 700), cases.random(4, 700, seed=1)
    p[0, 400] = q[1, 400] = broken
    p[2] = -math.inf
    divergence = backend(ops.full_kl, p, q, kind=kind)
    assert divergence[:3].isnan().all() and divergence[3].isfinite()


@pytest.mark.parametrize(
    "layout", [cases.transposed, cases.unaligned, cases.without_the_last_position], ids=cases.case_id
)
@pytest.mark.parametrize("kind", KINDS)
def test_layout_changes_no_bit(kernel_backend: Backend, kind: str, layout: Callable[[Tensor], Tensor]) -> None:
    p, q, upstream = cases.random(3, 4, 123), cases.random(3, 4, 123, seed=1), [cases.random(3, 4, seed=2)]
    want, want_gradients = run(lambda p, q: kernel_backend(ops.full_kl, p, q, kind=kind), [p, q], upstream)
    got, gradients = run(lambda p, q: kernel_backend(ops.full_kl, layout(p), q, kind=kind), [p, q], upstream)
    for a, b in zip([*got, *gradients], [*want, *want_gradients], strict=True):
        assert torch.equal(a, b)


def test_dtypes_may_differ(backend: Backend) -> None:
    p, q = cases.random(3, 40), cases.random(3, 40, seed=1, dtype=torch.bfloat16)
    (got,), gradients = run(lambda p, q: backend(ops.full_kl, p, q), [p, q], [torch.ones(3)])
    assert_close(got, reference.full_kl(p.double(), q.double()), 1e-6)
    assert [g.dtype for g in gradients] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_side_gets_no_gradient(backend: Backend, kind: str) -> None:
    p, q, upstream = cases.random(3, 40), cases.random(3, 40, seed=1), [cases.random(3, seed=2)]
    _, (both_p, both_q) = run(lambda p, q: backend(ops.full_kl, p, q, kind=kind), [p, q], upstream)
    _, (only_p,) = run(lambda p: backend(ops.full_kl, p, q, kind=kind), [p], upstream)
    _, (only_q,) = run(lambda q: backend(ops.full_kl, p, q, kind=kind), [q], upstream)
    assert torch.equal(only_p, both_p) and torch.equal(only_q, both_q)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch_nor_on_the_call(kernel_backend: Backend, kind: str) -> None:
    p, q, order = cases.random(5, 5001), cases.random(5, 5001, seed=1), torch.tensor([3, 0, 4, 1, 2])
    whole = kernel_backend(ops.full_kl, p, q, kind=kind)
    for _ in range(3 if kernel_backend.slow else 100):
        assert torch.equal(kernel_backend(ops.full_kl, p[order], q[order], kind=kind), whole[order])
    assert torch.equal(kernel_backend(ops.full_kl, p[2:3], q[2:3], kind=kind), whole[2:3])


@pytest.mark.seconds(4)
def test_compiles_and_is_registered_as_torch_wants_it() -> None:
    p, q, mask = cases.random(5, 40), cases.random(5, 40, seed=1), torch.tensor([True, False, True, True, True])
    compiled = torch.compile(ops.full_kl, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        got = run(lambda p, q: compiled(p, q, None, "js", 0.7), [p[:n], q[:n]], [torch.ones(n)])
        want = run(lambda p, q: ops.full_kl(p, q, None, "js", 0.7), [p[:n], q[:n]], [torch.ones(n)])
        for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
            assert torch.equal(a, b)
    forward = torch.ops.rlhf_fast.full_kl_forward.default
    backward = torch.ops.rlhf_fast.full_kl_backward.default
    options: list[Any] = [None, 0.7, 5.0, 1.0, mask]
    torch.library.opcheck(forward, (p.clone().requires_grad_(), q.clone().requires_grad_(), *options, "js", "cpu"))
    results = forward(p, q, *options, "js", "cpu")
    for needs in ([True, True], [True, False]):
        torch.library.opcheck(backward, (torch.ones(5), p, q, *options, *results, "js", needs, "cpu"))


def test_leaves_its_inputs_alone(backend: Backend) -> None:
    assert_leaves_inputs_alone(
        lambda *x: backend(ops.full_kl, *x), cases.random(3, 5).requires_grad_(), cases.random(3, 5).requires_grad_()
    )


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.zeros(3, 5), torch.zeros(3, 4)), ValueError, r"ref_logits: shape \(3, 4\), expected \(3, 5\)"),
        ((torch.zeros(3, 0), torch.zeros(3, 0)), ValueError, r"logits: shape \(3, 0\), expected \(\.\.\., V\) with V"),
        ((torch.zeros(3, 5), torch.zeros(3, 5), torch.ones(5) > 0), ValueError, r"mask: shape \(5,\), expected \(3,\)"),
        ((torch.zeros(3, 5), torch.zeros(3, 5), None, "jsd"), ValueError, "kind: 'jsd', did you mean 'js'"),
        (
            (torch.zeros(3, 5), torch.zeros(3, 5), None, "kl", 0.0),
            ValueError,
            "temperature: 0.0, expected a number > 0",
        ),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.full_kl(*arguments)
