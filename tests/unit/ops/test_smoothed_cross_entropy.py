"""Label smoothing and z-loss, of whole logits and from hidden states."""

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
from tests.unit.ops.compare import assert_close, assert_no_worse_than_torch, gradient_of
from tests.unit.ops.compare import outputs_and_gradients as run
from tests.unit.ops.conftest import Backend

TERMS: tuple[dict[str, Any], ...] = (
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.2, "z_loss": 1e-3, "logit_scale": 0.5},
    {"label_smoothing": 1.0, "z_loss": 1e-2, "softcap": 5.0, "logit_scale": 0.7},
)


def of_torch(logits: Tensor, tokens: Tensor, mask: Tensor, o: dict[str, Any]) -> Tensor:
    """As people write it."""
    z = logits[mask].to(torch.promote_types(logits.dtype, torch.float32)) * o.get("logit_scale", 1.0)
    if "softcap" in o:
        z = o["softcap"] * torch.tanh(z / o["softcap"])
    loss = F.cross_entropy(z, tokens[mask], label_smoothing=o.get("label_smoothing", 0.0))
    return loss + o.get("z_loss", 0.0) * torch.logsumexp(z, -1).square().mean()


@pytest.mark.parametrize("terms", TERMS, ids=lambda o: " ".join(o))
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
@pytest.mark.parametrize("vocabulary", [7, 123, 9001])
def test_is_torchs_loss_and_no_worse(
    backend: Backend, terms: dict[str, Any], dtype: torch.dtype, vocabulary: int
) -> None:
    if backend.slow and vocabulary > 1000:
        pytest.skip("takes long in an interpreter")
    logits, tokens = (
        cases.random(4, 9, vocabulary, scale=3.0, dtype=dtype),
        cases.random_tokens(4, 9, vocabulary=vocabulary),
    )
    mask, upstream = cases.holes(), [torch.tensor(1.7)]
    poisoned = cases.poison(logits, mask, math.nan)
    got, gradients = run(lambda x: backend(ops.cross_entropy, x, tokens, mask, **terms), [poisoned], upstream)
    stock, stock_gradients = run(lambda x: of_torch(x, tokens, mask, terms), [logits], upstream)
    truth, true_gradients = run(lambda x: of_torch(x, tokens, mask, terms), [logits.double()], upstream)
    assert [x.dtype for x in got + gradients] == [torch.float32, dtype]
    for a, b, c in zip(got + gradients, stock + stock_gradients, truth + true_gradients, strict=True):
        assert_no_worse_than_torch(a, b, c)


@pytest.mark.parametrize("terms", TERMS, ids=lambda o: " ".join(o))
def test_from_hidden_states_it_is_the_same(
    backend: Backend, terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lm_head._WHOLE_ROWS, "cpu", (7 * 30, 1))  # seven rows of thirty words
    shapes = ((4, 9, 8), (30, 8), (30,), (3, 8), (30, 3))
    inputs = [cases.random(*shape, seed=i) for i, shape in enumerate(shapes)]
    tokens, mask = cases.random_tokens(4, 9, vocabulary=30), cases.holes()

    def linear(h: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return backend(ops.linear_cross_entropy, h, w, tokens, bias, (a, b, 0.5), mask=mask, **terms)

    def whole(h: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return of_torch(F.linear(h, w, bias) + 0.5 * (h @ a.T) @ b.T, tokens, mask, terms)

    upstream = [torch.tensor(1.7)]
    got, gradients = run(linear, inputs, upstream)
    stock, stock_gradients = run(whole, inputs, upstream)
    truth, true_gradients = run(whole, [x.double() for x in inputs], upstream)
    for a, b, c in zip(got + gradients, stock + stock_gradients, truth + true_gradients, strict=True):
        assert_no_worse_than_torch(a, b, c)
    with torch.no_grad():
        assert_close(linear(*inputs), got[0], 1e-6)


def test_gradient_checks_in_float64() -> None:
    logits = cases.random(4, 6, dtype=torch.float64).requires_grad_()
    tokens = torch.tensor([1, -100, 5, 0])
    for terms in TERMS:
        assert torch.autograd.gradcheck(lambda x, o=terms: ops.cross_entropy(x, tokens, **o), [logits])


def test_words_that_cannot_be_are_asked_for_by_smoothing_alone(backend: Backend) -> None:
    logits = cases.random(3, 8)
    logits[:, 2] = -math.inf
    logits.requires_grad_()
    tokens = torch.tensor([0, 1, 3])
    loss = backend(ops.cross_entropy, logits, tokens, z_loss=1e-3)
    loss.backward()
    assert loss.isfinite() and not gradient_of(logits)[:, 2].any() and gradient_of(logits).isfinite().all()
    assert backend(ops.cross_entropy, logits.detach(), tokens, label_smoothing=0.1).item() == math.inf


def test_micro_batches_add_up_and_nothing_gives_zero(backend: Backend) -> None:
    logits, tokens = cases.random(9, 30), cases.random_tokens(9, vocabulary=30)
    whole = backend(ops.cross_entropy, logits, tokens, **TERMS[2])
    parts = [
        backend(ops.cross_entropy, logits[i], tokens[i], denominator=9, **TERMS[2]) for i in (slice(4), slice(4, 9))
    ]
    assert_close(parts[0] + parts[1], whole, 1e-6)
    left = logits.clone().requires_grad_()
    nothing = backend(ops.cross_entropy, left, torch.full((9,), -100), **TERMS[2])
    nothing.backward()
    assert nothing.item() == 0 and not gradient_of(left).any()


def test_compiles_and_is_registered_as_torch_wants_it() -> None:
    logits, tokens = cases.random(3, 4, 30).requires_grad_(), cases.random_tokens(3, 4, vocabulary=30)
    compiled = torch.compile(ops.cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    got, want = compiled(logits, tokens, label_smoothing=0.1), ops.cross_entropy(logits, tokens, label_smoothing=0.1)
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0])
    mask = cases.random(3, 4, seed=1) > -0.5
    op = torch.ops.rlhf_fast.cross_entropy_forward.default
    torch.library.opcheck(op, (logits, tokens, mask, 5.0, 0.5, 0.1, 1e-3, "cpu"))


@pytest.mark.parametrize("change", [{"label_smoothing": -0.1}, {"label_smoothing": 1.1}, {"z_loss": -1.0}])
def test_bad_numbers_are_named(change: dict[str, float]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"{name}: {change[name]}, expected a number"):
        ops.cross_entropy(torch.zeros(2, 3), torch.zeros(2).long(), **change)
    with pytest.raises(ValueError, match=f"{name}: {change[name]}, expected a number"):
        ops.linear_cross_entropy(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2).long(), **change)
