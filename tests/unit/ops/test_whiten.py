from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from torch import Tensor

from rlhf_fast import ops
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_leaves_inputs_alone
from tests.unit.ops.compare import outputs_and_gradients as run


def definition(x: Tensor, mask: Tensor, shift_mean: bool, eps: float = 1e-8) -> Tensor:
    """With Python's own mean and sample variance."""
    kept = x[mask].tolist()
    mean = statistics.fmean(kept)
    variance = statistics.variance(kept) if len(kept) > 1 else 0.0
    white = (x - mean) / math.sqrt(variance + eps) + (0.0 if shift_mean else mean)
    return torch.where(mask, white, 0)


@pytest.mark.parametrize("shift_mean", [True, False])
@cases.property_test
@given(ragged=cases.ragged_masks())
def test_is_the_definition(shift_mean: bool, ragged: tuple[list[int], Tensor]) -> None:
    _, mask = ragged
    x = cases.random(*mask.shape, scale=3, dtype=torch.float64) + 5
    got = ops.whiten(x, mask, shift_mean)
    if mask.any():
        assert_close(got, definition(x, mask, shift_mean), 1e-10)
    else:
        assert torch.equal(got, torch.zeros_like(x))


def test_result_has_mean_0_and_variance_1_over_the_unmasked() -> None:
    mask = cases.holes()
    white = ops.whiten(cases.random(4, 9, scale=7) + 100, mask)
    assert abs(white[mask].mean().item()) < 1e-5
    assert abs(white[mask].var().item() - 1) < 1e-5


def test_whole_tensor_agrees_with_torch_var() -> None:
    x = cases.random(5, 6, 7, dtype=torch.float64)
    assert_close(ops.whiten(x), (x - x.mean()) / (x.var() + 1e-8).sqrt(), 1e-12)


def test_rewards_keep_their_sign_without_mean_shift() -> None:
    x = cases.random(50, dtype=torch.float64).abs() + 4
    assert (ops.whiten(x, shift_mean=False) > 0).all()
    assert_close(ops.whiten(x, shift_mean=False).mean(), x.mean(), 1e-12)


@pytest.mark.parametrize("unmasked", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_one_token_or_none_gives_no_nan(unmasked: int, shift_mean: bool) -> None:
    mask = torch.arange(4) < unmasked
    (out,), (gradient,) = run(lambda x: ops.whiten(x, mask, shift_mean), [torch.full((4,), 3.0)], [torch.ones(4)])
    assert out.tolist() == [0.0 if shift_mean or not unmasked else 3.0, 0.0, 0.0, 0.0]
    assert gradient.isfinite().all()
    assert torch.equal(gradient[~mask], torch.zeros(4 - unmasked))


def test_equal_elements_give_no_nan() -> None:
    (out,), (gradient,) = run(lambda x: ops.whiten(x), [torch.full((6,), 2.5)], [cases.random(6)])
    assert torch.equal(out, torch.zeros(6))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_positions_may_hold_anything_and_get_no_gradient(shift_mean: bool) -> None:
    mask = cases.holes()
    x, upstream = cases.random(4, 9), [cases.random(4, 9, seed=1)]
    got, gradients = run(lambda x: ops.whiten(x, mask, shift_mean), [cases.poison(x, mask)], upstream)
    want, want_gradients = run(lambda x: ops.whiten(x, mask, shift_mean), [x], upstream)
    assert torch.equal(got[0], want[0]) and torch.equal(gradients[0], want_gradients[0])
    assert torch.equal(got[0][~mask], torch.zeros_like(got[0][~mask]))
    assert torch.equal(gradients[0][~mask], torch.zeros_like(got[0][~mask]))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_gradient_checks_in_float64(shift_mean: bool) -> None:
    x = cases.random(4, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.whiten(x, cases.holes(), shift_mean), [x])


def test_narrow_floats_give_float32() -> None:
    for dtype in cases.FLOATS:
        x = cases.random(40, dtype=dtype)
        assert ops.whiten(x).dtype == torch.float32
        assert_close(ops.whiten(x), ops.whiten(x.double()), 1e-5)


def test_leaves_its_inputs_alone() -> None:
    assert_leaves_inputs_alone(ops.whiten, cases.random(4, 9).requires_grad_(), cases.holes())


def test_bad_input_is_named() -> None:
    with pytest.raises(TypeError, match="x: int64, expected float32"):
        ops.whiten(torch.arange(3))
    with pytest.raises(ValueError, match=r"mask: shape \(2,\), expected \(3,\) like x"):
        ops.whiten(torch.zeros(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="eps: 0, expected a number > 0"):
        ops.whiten(torch.zeros(3), eps=0)
