from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import lm_head
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_leaves_inputs_alone, assert_no_worse_than_torch
from tests.unit.ops.compare import outputs_and_gradients as run
from tests.unit.ops.conftest import Backend


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


# --- gradients in the forward sweep -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
def test_the_sweep_is_no_worse_than_torch(
    kernel_backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lm_head._WHOLE_ROWS, kernel_backend.device.type, (7 * 30, 1))  # seven rows of thirty words
    shapes = ((4, 9, 8), (30, 8), (30,), (3, 8), (30, 3))
    inputs = [cases.random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    tokens, mask = cases.random_tokens(4, 9, vocabulary=30), cases.holes()

    def on(backend: Backend) -> Any:
        def op(h: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return backend(
                ops.linear_cross_entropy, h, w, tokens, bias, (a, b, 0.5), softcap=5.0, logit_scale=0.5, mask=mask
            )

        return op

    upstream, plain = [torch.tensor(1.7)], on(Backend("reference"))
    got, gradients = run(on(kernel_backend), inputs, upstream)
    stock, stock_gradients = run(plain, inputs, upstream)
    truth, true_gradients = run(plain, [x.double() for x in inputs], upstream)
    assert [x.dtype for x in gradients] == [dtype] * 5
    for x, y, z in zip(got + gradients, stock + stock_gradients, truth + true_gradients, strict=True):
        assert_no_worse_than_torch(x, y, z)


def test_a_large_vocabulary_is_computed_twice_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, tokens = [cases.random(9, 8), cases.random(30, 8, seed=1)], cases.random_tokens(9, vocabulary=30)
    swept, gradients = run(lambda h, w: ops.linear_cross_entropy(h, w, tokens), inputs, [torch.ones(())])
    monkeypatch.setitem(lm_head._WHOLE_ROWS, "cpu", (7 * 30, 64))
    twice, others = run(lambda h, w: ops.linear_cross_entropy(h, w, tokens), inputs, [torch.ones(())])
    for x, y in zip(swept + gradients, twice + others, strict=True):
        assert_close(x, y, 1e-5)


def test_a_graph_that_is_kept_gives_the_same_gradient_again() -> None:
    hidden, weight = cases.random(9, 8), cases.random(30, 8, seed=1).requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, cases.random_tokens(9, vocabulary=30))
    (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (again,) = torch.autograd.grad(loss, weight)
    assert torch.equal(once, again)


def test_compiles_with_changing_shapes() -> None:
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    weight = cases.random(30, 8, seed=1).requires_grad_()
    for n in (5, 9):
        hidden, tokens = cases.random(n, 8), cases.random_tokens(n, vocabulary=30)
        got, want = compiled(hidden, weight, tokens), ops.linear_cross_entropy(hidden, weight, tokens)
        assert torch.equal(got, want)
        assert torch.equal(torch.autograd.grad(got, weight)[0], torch.autograd.grad(want, weight)[0])


def test_is_registered_as_torch_wants_it() -> None:
    hidden, weight, bias = (cases.random(*shape).requires_grad_() for shape in ((3, 4, 8), (30, 8), (30,)))
    mask, tokens = cases.random(3, 4, seed=1) > -0.5, cases.random_tokens(3, 4, vocabulary=30)
    needs = [True, True, True, False, False]
    arguments = (
        hidden, weight, tokens, bias, None, None, 0.0, None, 1.0, 5.0, 0.5, mask, 0.1, 1e-3, needs, False, "cpu"
    )  # fmt: skip
    torch.library.opcheck(torch.ops.rlhf_fast.linear_cross_entropy_forward.default, arguments)
